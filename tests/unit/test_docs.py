"""The documents say what is there: files, links, and what the code cites by number."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*(ROOT / "modiff").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
METHOD, ARCHITECTURE = ((ROOT / "docs" / name).read_text() for name in ("method.md", "architecture.md"))


def cited(word):
    """Numbers that the code cites after a word, with the file of each."""
    for path in SOURCES:
        for number in re.findall(rf"\b{word} (\d+)\b", path.read_text()):
            yield int(number), path.relative_to(ROOT)


def listed(text, heading):
    """Numbers of the list under a heading."""
    section = text.split(f"## {heading}")[1].split("\n## ")[0]
    return {int(number) for number in re.findall(r"^(\d+)\. ", section, re.MULTILINE)}


@pytest.mark.parametrize(
    ("word", "text", "heading"),
    [("[Tt]rap", METHOD, "2. Traps"), ("[Ii]nvariant", ARCHITECTURE, "Invariants")],
)
def test_numbers_that_the_code_cites_are_listed(word, text, heading):
    numbers = listed(text, heading)
    found = dict(cited(word))
    assert found
    assert numbers == set(range(1, max(numbers) + 1))
    assert {number: path for number, path in found.items() if number not in numbers} == {}


def test_equations_of_the_operators_are_in_the_table():
    table = {int(number) for number in re.findall(r"^\| \((\d+)\) \|", METHOD, re.MULTILINE)}
    for path in (ROOT / "modiff" / "operators").glob("*.py"):
        for number in re.findall(r"[Ee]quation \(?(\d+)", path.read_text()):
            if "SmoothQuant" not in path.read_text():  # rewrites.py cites that paper's equations
                assert int(number) in table, path.name
    assert table == {4, 5, 6, 8, 9, 13, 14, 18}


def test_files_that_the_architecture_names_are_there():
    package = {path.relative_to(ROOT / "modiff").as_posix() for path in (ROOT / "modiff").rglob("*") if path.is_file()}
    room = None
    for line in ARCHITECTURE.splitlines():
        first = re.match(r"\| `(\w+)/` \|", line)
        room = f"{first[1]}/" if first else ""
        for name in re.findall(r"`([\w/]+\.py)", line):
            known = name in package or room + name in package or (ROOT / name).is_file()
            assert known or name.startswith("metrics/*"), name


def test_every_room_has_a_line_and_no_other():
    rooms = {path.name for path in (ROOT / "modiff").iterdir() if (path / "__init__.py").is_file()}
    assert set(re.findall(r"^\| `(\w+)/` \|", ARCHITECTURE, re.MULTILINE)) == rooms


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
