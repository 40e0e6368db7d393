"""What the README shows is true: its Python runs, and every file it names is there."""

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


def test_the_figures_of_the_readme_table_are_those_of_the_benchmark_within_its_spread() -> None:
    """The demo's seed lies near the three seeds of the benchmark, which uses fewer images."""
    import json

    rows = json.loads((ROOT / "benchmarks" / "mnist_bits.json").read_text())["rows"]
    for recipe, arm in (("ptq", "ptq"), ("modiff", "modiff"), ("modiff_no_compensation", "no compensation")):
        shown = re.search(rf"w8a4_{recipe}.yaml` \| \**([\d.]+) dB", README)
        assert shown is not None
        values = [r["psnr_db"] for r in rows if (r["arm"], r["bits"], r["symmetry"]) == (arm, 4, "preset")]
        assert min(values) - 1 < float(shown[1]) < max(values) + 1
