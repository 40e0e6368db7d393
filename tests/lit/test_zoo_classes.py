"""Pipelines of diffusers, one row a class: called, repeated, saved and loaded, restored; what is refused says why."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from zoo import Row, build, drawn
from zoo_rows import ROWS

import modiff
from modiff.errors import TrajectoryError

SAMPLE = (
    "DDPMPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusion3Pipeline",
    "WanPipeline",
    "Lumina2Pipeline",
    "BriaPipeline",
    "StableDiffusionSAGPipeline",
)
"""Run by default: one of each way in which calls are told apart, and a refusal."""
diffusers.logging.set_verbosity_error()


def rows(names: tuple[str, ...] | None) -> list[Row]:
    return [row for row in ROWS if names is None or row.name in names]


def students(pipe: Any) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "transformer") if getattr(pipe, name, None) is not None}


def check(row: Row, folder: Path) -> None:
    pipe, call = build(row)
    teacher = drawn(pipe, call)
    assert torch.isfinite(teacher).all()
    modiff.quantize_pipeline(pipe, row.config, contexts=row.contexts)
    if row.refused is not None:
        with pytest.raises(TrajectoryError, match=row.refused):
            drawn(pipe, call)
        modiff.restore_pipeline(pipe)
        assert torch.equal(drawn(pipe, call), teacher)
        return
    images = drawn(pipe, call)
    assert not torch.equal(images, teacher)
    for run in pipe.trajectories.values():
        assert run.quantized == run.total - len(run.contexts) > 0
    assert torch.equal(drawn(pipe, call), images)
    other, _ = build(row, seed=1)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in students(pipe):
            other.components[name].load_state_dict(part.state_dict())
    for name, student in students(pipe).items():
        modiff.save(student, folder / name)
        modiff.load(folder / name, getattr(other, name))
    modiff.quantize_pipeline(other, contexts=row.contexts)
    assert torch.equal(drawn(other, call), images)
    modiff.restore_pipeline(pipe)
    assert torch.equal(drawn(pipe, call), teacher)


def quietly(row: Row, folder: Path) -> None:
    """Without the warnings of diffusers that a class, or a part of it, is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        check(row, folder)


def test_there_are_enough_rows() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) >= 60
    assert {row.name for row in rows(SAMPLE)} == set(SAMPLE)


@pytest.mark.parametrize("row", rows(SAMPLE), ids=str)
def test_a_sample_of_classes(row, tmp_path) -> None:
    quietly(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(None), ids=str)
def test_every_class(row, tmp_path) -> None:
    quietly(row, tmp_path)
