"""A recipe for the tiny teacher, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modiff.lit.cli.main import main
from modiff.lit.modules.student import LitStudent

RECIPE = """
seed: 0
num_images: 8
wandb: disabled
error_images: 2
timing_rounds: 1
sample_count: 4
model:
  teacher:
    path: {teacher}
  preset: w8a4-modiff
  scheduler: ddim
  steps: 4
  features: {features}
data:
  batch_size: 4
trainer:
  accelerator: cpu
  enable_progress_bar: false
"""
CALIBRATION = """
  calibration:
    method: gptq
    num_images: 6
    images_per_batch: 4
    evaluations: 2
    positions: 200
    samples: 8
    iterations: 4
    tuning_iterations: 3
"""


@pytest.fixture(scope="session")
def recipe_text(tiny_teacher: Path, tiny_features: Path) -> str:
    """A recipe of ``modiff evaluate``: 8 images in batches of 4, 4 steps."""
    return RECIPE.format(teacher=tiny_teacher, features=tiny_features)


@pytest.fixture
def recipe(tmp_path: Path, recipe_text: str) -> Path:
    """The same as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text)
    return path


@pytest.fixture
def calibrated(tmp_path: Path, recipe_text: str) -> Path:
    """A recipe that asks for GPTQ weights of 3 bits."""
    path = tmp_path / "calibrated.yaml"
    text = recipe_text.replace("w8a4", "w3a4")
    path.write_text(text.replace("\n  scheduler:", CALIBRATION.rstrip() + "\n  scheduler:"))
    return path


@pytest.fixture
def modiff(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; returns status, output and errors."""

    def run(*args: str | Path) -> tuple[int, str, str]:
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of calibrations, for every test its own."""
    folder = tmp_path / "modiff-cache"
    monkeypatch.setenv("MODIFF_CACHE", str(folder))
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, int]]:
    """Who drew which batch, in order."""
    calls: list[tuple[str, int]] = []
    draw = LitStudent.draw

    def counted(self, who, indices):
        calls.append((who, int(indices[0])))
        return draw(self, who, indices)

    monkeypatch.setattr(LitStudent, "draw", counted)
    return calls


@pytest.fixture(scope="session")
def finished(tmp_path_factory, recipe_text) -> tuple[Path, Path]:
    """A recipe of 10 images in batches of 4, and its finished run."""
    from modiff.lit.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_text.replace("num_images: 8", "num_images: 10"))
    assert main(["evaluate", "--config", str(recipe), "--save_images", "true", "--output", str(folder / "out")]) == 0
    return recipe, folder / "out"
