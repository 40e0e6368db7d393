"""Every script of examples/ runs, and prints what it promises."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
PRINTS = {
    "diffusers_pipeline.py": ("5 of 6 evaluations had activations of 6 bits", "dB", "restored bit for bit: True"),
    "own_model.py": ("conv_out", "8 bit, sample, symmetric", "19 of 20 evaluations quantized", "GBOPs per image"),
    "guidance.py": (
        "one batch: 9 of 10 evaluations quantized",
        "two calls, uncond: 9 of 10",
        "two calls, cond: 9 of 10",
        "because the input is fixed: prompt",
    ),
    "saved_student.py": ("saved ", "same images bit for bit: True"),
}


def test_every_example_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == set(PRINTS)


@pytest.mark.parametrize("name", PRINTS)
def test_an_example_runs(name, capsys):
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    printed = capsys.readouterr().out
    for text in PRINTS[name]:
        assert text in printed
