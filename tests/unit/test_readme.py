"""What the README shows is true: its Python runs, and every file it names is there."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(capsys) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    exec(compile(block[1], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "conv_in" in printed
    assert printed.rstrip().endswith("3 2")


def test_every_file_the_readme_names_is_there() -> None:
    named = set(re.findall(r"\b(?:recipes|benchmarks|docs|modiff|examples)/[\w./-]*\w\.(?:yaml|md|png|py)\b", README))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_figures_of_the_readme_are_those_of_the_benchmarks_within_their_spread() -> None:
    """The demo's seed lies near the three seeds of the benchmarks, which use fewer images."""
    shown = re.search(r"w8a4_modiff.yaml` \| \**([\d.]+) dB", README)
    rows = json.loads((ROOT / "benchmarks" / "bits.json").read_text())["mnist"]["rows"]
    best = [r["psnr_db"] for r in rows if (r["weights"], r["bits"], r["arm"]) == (8, 4, "modiff")]
    assert shown is not None
    assert min(best) - 1 < float(shown[1]) < max(best) + 1
    paper = re.search(r"`w8a4-modiff-paper`: ([\d.]+) dB", README)
    rows = json.loads((ROOT / "benchmarks" / "mnist_bits.json").read_text())["rows"]
    kept = [r["psnr_db"] for r in rows if (r["arm"], r["bits"], r["symmetry"]) == ("modiff", 4, "preset")]
    assert paper is not None
    assert min(kept) - 1 < float(paper[1]) < max(kept) + 1
