"""Variants of the element-wise kernels that no table names, compiled for a GPU that is not there.

The interpreter does not see what only the compiler refuses, such as code behind a return.
"""

from __future__ import annotations

from typing import Any

import pytest

from modiff.kernels.triton import support

if support.missing() is not None:
    pytest.skip(f"{support.missing()}", allow_module_level=True)

from modiff.kernels.triton import encoding, norms, proof, scaling
from modiff.kernels.triton.support import ROW
from modiff.kernels.triton.tables import ARCHITECTURES

SIZES = ("height", "width", "top_pad", "left_pad", "padded_height", "padded_width")
GRID = {"held": "*i16", "step": "*fp32", "center": "*fp32"}
TOKEN = {"PER": 2, "height": 1, "padded_height": 1}


def quantize(**changes: Any) -> tuple[Any, dict[str, Any]]:
    usual: dict[str, Any] = {"a": "*fp16", "held": "*fp32", "codes": "*i8", "lows": "*fp32", "highs": "*fp32"}
    usual |= {"probes": "*fp32", "scale": "*fp32"}
    usual |= dict.fromkeys(("zero", "units", "known", "again", "before", "step", "center"))
    usual |= dict.fromkeys(("mean", "rstd", "mul", "add", "offset"))
    usual |= dict.fromkeys(SIZES, "i32:1")
    usual |= {"channels": "i32", "padded_channels": "i32", "a_row": "i32", "a_channel": 1, "held_row": "i32"}
    usual |= {
        "held_channel": 1,
        "affine_sample": "i32",
        "group_size": "i32:1",
        "epsilon": "fp32",
        "highest": "fp32",
        "clip": "fp32",
    }
    usual |= {"factor": "fp32", "PER": 1, "SYMMETRIC": True, "CLIPS": True, "COMPENSATES": True, "MEASURES": False}
    usual |= {"NORM": 0, "ACTIVATION": 0, "AGAIN": False, "BLOCK_R": 16, "BLOCK_C": 128}
    return encoding.quantize_kernel, {**usual, **changes}


def settle(**changes: Any) -> tuple[Any, dict[str, Any]]:
    usual: dict[str, Any] = dict.fromkeys(("lows", "highs", "before"), "*fp32") | {"before_zero": None}
    usual |= {"last": "*fp32", "scale": "*fp32", "zero": None, "again": "*fp32", "step": None, "sets": "i32:1"}
    usual |= {"parts": "i32:1", "highest": "fp32", "clip": "fp32", "factor": "fp32", "margin": "fp32"}
    return scaling.settle_kernel, {**usual, "SYMMETRIC": True, "BLOCK": 64, **changes}


def shared(**changes: Any) -> tuple[Any, dict[str, Any]]:
    usual: dict[str, Any] = {"lows": "*fp32", "highs": "*fp32", "scale": "*fp32", "zero": None, "power": "*fp32"}
    usual |= {"unit": "*fp32", "probes": "*fp32", "step": None, "parts": "i32:1", "channels": "i32", "most": "i32:1"}
    usual |= {"highest": "fp32", "clip": "fp32", "factor": "fp32", "room": "fp32", "SYMMETRIC": True}
    return scaling.shared_kernel, {**usual, "BLOCK_P": 4, "BLOCK_C": 512, **changes}


def scale(**changes: Any) -> tuple[Any, dict[str, Any]]:
    usual = {"lows": "*fp32", "highs": "*fp32", "scale": "*fp32", "zero": None, "probes": "*fp32", "step": None}
    usual |= {"parts": "i32:1", "highest": "fp32", "clip": "fp32", "factor": "fp32", "margin": "fp32"}
    return scaling.scale_kernel, {**usual, "SYMMETRIC": True, "BLOCK": 64, **changes}


RANGE: dict[str, Any] = {"a": "*fp16", "held": "*fp32", "lows": "*fp32", "highs": "*fp32", "step": None, "center": None}
RANGE |= dict.fromkeys(("mean", "rstd", "mul", "add", "offset"))
RANGE |= {"rows": "i32:1", "channels": "i32", "a_row": 1, "a_channel": "i32", "held_row": 1, "held_channel": "i32"}
RANGE |= {"affine_sample": "i32", "group_size": "i32:1", "epsilon": "fp32", "NORM": 0, "ACTIVATION": 0}
RANGE |= {"PER_CHANNEL": False, "BLOCK_R": 16, "BLOCK_C": 128, "REPEATS": 4}
MOMENTS: dict[str, Any] = {
    "a": "*fp16",
    "offset": "*fp32",
    "means": "*fp32",
    "squares": "*fp32",
    "rows": "i32:1",
    "channels": "i32",
}
MOMENTS |= {"a_row": "i32", "a_channel": 1, "BLOCK_R": 32, "BLOCK_C": 128}
GROUP: dict[str, Any] = {"means": "*fp32", "squares": "*fp32", "mean": "*fp32", "rstd": "*fp32", "rows": "i32:1"}
GROUP |= {"channels": "i32", "group_size": "i32:1", "blocks": "i32:1", "epsilon": "fp32"}
GROUP |= {"BLOCK_R": 32, "BLOCK_P": 16, "BLOCK_C": 8}
WIDEST = {"BLOCK_P": 1, "BLOCK_C": ROW}
VARIANTS = {
    "asymmetric": quantize(SYMMETRIC=False, zero="*fp32"),
    "plain": quantize(held=None),
    "plain, asymmetric, per token": quantize(held=None, SYMMETRIC=False, **TOKEN),
    "uncompensated, int16": quantize(COMPENSATES=False, **GRID),
    "uncompensated, float": quantize(COMPENSATES=False),
    "asymmetric, per token, int16": quantize(SYMMETRIC=False, **GRID, **TOKEN),
    "per sample and channel": quantize(PER=3, units="*fp32"),
    "measures": quantize(PER=0, MEASURES=True),
    "adaptive norm": quantize(NORM=2, mul="*fp32", add="*fp32", **TOKEN),
    "GELU": quantize(ACTIVATION=3),
    "GELU by tanh": quantize(ACTIVATION=2, **GRID),
    "with the scale of the evaluation before": quantize(MEASURES=True, known="*fp32", **GRID),
    "anew, int16": quantize(AGAIN=True, again="*fp32", before="*fp32", **GRID),
    "anew, float, group norm": quantize(
        AGAIN=True, again="*fp32", before="*fp32", NORM=1, mean="*fp32", rstd="*fp32", mul="*fp32", ACTIVATION=1
    ),
    "kept or own scale": settle(),
    "kept or own scale, asymmetric, int16": settle(before_zero="*fp32", zero="*fp32", step="*fp32", SYMMETRIC=False),
    "powers of two": shared(),
    "powers of two, asymmetric, int16": shared(zero="*fp32", step="*fp32", SYMMETRIC=False),
    "powers of two, of as many channels as may be": shared(SYMMETRIC=False, zero="*fp32", step="*fp32", **WIDEST),
    "scale": scale(),
    "scale, asymmetric, int16": scale(zero="*fp32", step="*fp32", SYMMETRIC=False),
    "scale of one part": scale(parts=1),
    "range": (encoding.range_kernel, RANGE),
    "moments": (norms.moments_kernel, MOMENTS),
    "groups": (norms.group_kernel, GROUP),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_compiles_without_spills(name: str, architecture: str) -> None:
    kernel, arguments = VARIANTS[name]
    warps = 16 if arguments.get("BLOCK_C") == ROW else 4
    assert proof.compile_kernel(architecture, kernel, name, "", arguments, warps, stages=3).stack == 0
