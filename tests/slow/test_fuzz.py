"""Mutated configurations and damaged checkpoints: an error of modiff's, or something that works; never a traceback.

Every case is drawn from its number, so that one that fails can be run again alone.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modiff
from modiff import QuantConfig
from modiff.errors import ModiffError
from modiff.storage.folder import CONFIG, TENSORS
from modiff.storage.hashing import hash_json

CASES = 700
DAMAGES = 800
PART = 50
PRESETS = ("w8a8-modiff", "w4a4-modiff", "w4a6-ptq", "w8a32-modiff")
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2,
    3,
    10**9,
    10**30,
    10**5000,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "inherit",
    "group",
    "sample",
    "re:(",
    [],
    [1],
    {},
    {"bits": 4},
    {"a": {"b": 1}},
    [{"pattern": "*"}],
    [{"name": "a", "at": 2}],
    [{"name": "a", "at": 2}, {"name": "a", "at": 1}],
)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("a", nn.Conv2d(4, 6, 3, padding=1))
    net.add_module("up", nn.ConvTranspose2d(6, 6, 2, stride=2))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("norm", nn.LayerNorm(6))
    net.add_module("b", nn.Linear(6, 5))
    return net


X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(3))


def run(student: nn.Module) -> list[torch.Tensor]:
    with modiff.trajectory(student):
        return [student(X * (1 - 0.1 * i)) for i in range(3)]


def require_plain(error: ModiffError, case: int) -> None:
    """One message of a readable length."""
    assert 0 < len(str(error)) < 2000, case


def mutate(values: Any, draw: random.Random) -> Any:
    """Change, drop or add something at a random place of nested containers."""
    if isinstance(values, dict) and values and draw.random() < 0.8:
        key = draw.choice(sorted(values, key=str))
        if draw.random() < 0.6:
            values[key] = mutate(values[key], draw)
        elif draw.random() < 0.5:
            del values[key]
        else:
            values[draw.choice((f"{key}x", "bits", "format"))] = draw.choice(ODD)
        return values
    if isinstance(values, (list, tuple)) and values and draw.random() < 0.6:
        items = list(values)
        place = draw.randrange(len(items))
        items[place] = mutate(items[place], draw)
        return items
    if isinstance(values, str) and draw.random() < 0.3:
        return values + "x"
    return copy.deepcopy(draw.choice(ODD))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, CASES, PART))
def test_mutated_configurations(part) -> None:
    worked = 0
    for case in range(part, part + PART):
        draw = random.Random(case)
        values = json.loads(json.dumps(dataclasses.asdict(QuantConfig.preset(draw.choice(PRESETS)))))
        for _ in range(draw.choice((1, 1, 2, 3))):
            values = mutate(values, draw)
        try:
            outputs = run(modiff.quantize(model(), QuantConfig.from_dict(values)))
        except ModiffError as error:
            require_plain(error, case)
            continue
        except Exception as error:
            raise AssertionError(f"case {case}") from error
        assert all(torch.isfinite(output).all() for output in outputs), case
        worked += 1
    assert worked < PART  # a mutation that nobody notices is no mutation


def damage(folder: Path, draw: random.Random) -> str:
    """Damage a checkpoint in one way; returns how."""
    manifest, tensors = folder / CONFIG, folder / TENSORS
    how = draw.choice(("flip", "cut", "grow", "zero", "edit", "edit", "edit", "drop", "text"))
    file = draw.choice((manifest, tensors))
    content = bytearray(file.read_bytes())
    if how == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "grow":
        content += b"x" * draw.randrange(1, 9)
    elif how == "zero":
        start = draw.randrange(len(content))
        content[start : start + 16] = bytes(min(16, len(content) - start))
    elif how == "text":
        content = bytearray(draw.choice((b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"format": "modiff"}')))
    if how == "edit":
        values = json.loads(manifest.read_text())
        values.pop("sha256")
        values = mutate(values, draw)
        try:
            if isinstance(values, dict):
                values["sha256"] = hash_json(values)
            manifest.write_text(json.dumps(values))
        except ValueError:  # numbers that JSON does not have
            manifest.write_text("{}")
    elif how == "drop":
        file.unlink()
    else:
        file.write_bytes(bytes(content))
    return f"{how} {file.name}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(0, DAMAGES, PART))
def test_damaged_checkpoints(part, tmp_path) -> None:
    student = modiff.quantize(model(), QuantConfig.preset("w4a4-modiff"))
    expected = run(student)
    modiff.save(student, tmp_path / "whole", teacher="somewhere")
    for case in range(part, part + PART):
        draw = random.Random(case)
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        how = damage(folder, draw)
        other = model(1)
        before = other(X)
        try:
            loaded = modiff.load(folder, other)
        except ModiffError as error:
            require_plain(error, case)
            unchanged = torch.equal(other(X), before)
        except Exception as error:
            raise AssertionError(f"case {case} ({how})") from error
        else:
            same = all(torch.equal(one, two) for one, two in zip(run(loaded), expected, strict=True))
            unchanged = same or how.startswith("edit")  # whoever edits the quantization gets another one
        assert unchanged, f"case {case} ({how}): another model than before, or than was saved"


def test_a_few_of_each(tmp_path) -> None:
    """By default, so that the two above cannot rot."""
    for case in range(12):
        draw = random.Random(case)
        values = mutate(dataclasses.asdict(QuantConfig.preset("w4a4-modiff")), draw)
        try:
            modiff.quantize(model(), QuantConfig.from_dict(values))
        except ModiffError:
            continue
    student = modiff.quantize(model(), QuantConfig.preset("w4a4-modiff"))
    modiff.save(student, tmp_path / "whole")
    for case in range(12):
        folder = tmp_path / f"damaged{case}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder, random.Random(case))
        try:
            modiff.load(folder, model(1))
        except ModiffError:
            continue
