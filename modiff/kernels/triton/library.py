"""The kernels as operators of PyTorch: opaque to ``torch.compile``, which learns shapes and dtypes from the fakes.

On CUDA they launch kernels; on the CPU they do so only in Triton's interpreter, which is how they are proven.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modiff.kernels.triton import launch
from modiff.kernels.triton.launch import Codes, Norm

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_GRID = "Tensor? step, Tensor? center"
_NUMBERS = "int highest, float clip, bool symmetric, bool clips"


# fmt: off
def _quantize(
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, units: Tensor | None, per: int, pads: list[int], padded_channels: int,
    highest: int, clip: float, symmetric: bool, clips: bool, compensates: bool, measures: bool,
) -> Five:
    """Equations (4), (5) and (13) in one pass, or in two where the scale is not known.

    Args:
        a: Any float ``[samples, height, width, channels]``; see :func:`modiff.kernels.triton.launch.strides`.
        held: â, likewise, float or int16; advanced in place.
        step: Of the int16 grid.
        center: Of the int16 grid.
        scale: See :func:`modiff.kernels.triton.launch.quantize`, like zero, units and per; None: found from the range
            of ``a - â``, by a pass of its own unless each token has one.
        zero: Zero points.
        units: What one code is worth in the container.
        per: Which elements share a scale.
        pads: Zeros above, below, left and right of the image.
        padded_channels: Channels of the codes.
        highest: Code.
        clip: Share of the range that is kept.
        symmetric: Codes -highest..highest; else 0..highest.
        clips: Codes can fall outside.
        compensates: See :class:`modiff.quantizers.held.Held`.
        measures: Also return the range of the residual.

    Returns:
        Codes less their zero point, int8 ``[samples, padded height, padded width, padded channels]``; the scale that
        was found, float32, empty where it was known; a scalar that is NaN where ``a`` is not finite; lows and highs
        ``[samples, parts]``, empty where nothing is measured.
    """
    numbers, found, given = Codes(highest, clip, symmetric, clips), None, scale
    grid = None if step is None or center is None else (step, center)
    if scale is None and per != launch.TOKEN:
        lows, highs = launch.ranges(a, held, grid, per_channel=False)
        sets = 1 if per == launch.TENSOR else a.shape[0]
        scale, zero, found = launch.scales(lows.view(sets, -1), highs.view(sets, -1), step, numbers)
    scale = _room(a) if scale is None else scale
    codes = torch.empty(_padded(a, pads, padded_channels), dtype=torch.int8, device=a.device)
    probes, lows, highs = launch.quantize(
        codes, a, held, grid, scale, zero, units, per, numbers, (pads[0], pads[2]), compensates, measures
    )
    probe = (probes if found is None else found).sum()
    return codes, scale if given is None else scale.new_empty(0), probe, lows, highs


def _fake_quantize(
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, units: Tensor | None, per: int, pads: list[int], padded_channels: int,
    *rest: Any,
) -> Five:
    sets = {launch.TENSOR: 1, launch.SAMPLE: a.shape[0], launch.TOKEN: a.shape[:-1].numel()}
    found = sets[per] if scale is None else 0
    return _fakes(a, pads, padded_channels, found, whole=per == launch.TOKEN, measures=rest[-1])


def _norm_quantize(
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, per: int, pads: list[int], padded_channels: int,
    highest: int, clip: float, symmetric: bool, clips: bool, measures: bool, groups: int, epsilon: float,
    gamma: Tensor | None, beta: Tensor | None, gain: Tensor | None, shift: Tensor | None, silu: bool,
) -> Five:
    """:func:`_quantize` of a normalized input, which itself is never written.

    Args:
        a: What the norm reads.
        held: â of what the norm gives; see :func:`_quantize`, like all that is not named here.
        step: Of the int16 grid.
        center: Of the int16 grid.
        scale: It must be known, unless each token has one.
        zero: Zero points.
        per: Which elements share a scale; not sample and channel.
        pads: Zeros around the image.
        padded_channels: Channels of the codes.
        highest: Code.
        clip: Share of the range.
        symmetric: Codes -highest..highest.
        clips: Codes can fall outside.
        measures: Also return the range of the residual.
        groups: Of a GroupNorm; 0: LayerNorm.
        epsilon: Of the norm.
        gamma: Weight of the norm, ``[channels]``.
        beta: Its bias.
        gain: Of an adaptive norm, ``[samples, channels]``.
        shift: Of an adaptive norm.
        silu: Whether SiLU follows.

    Raises:
        ValueError: The scale is neither known nor per token: its range needs what this operator does not write.
    """
    if scale is None and per != launch.TOKEN:
        raise ValueError("A scale per tensor or sample must be known where the norm is fused; quantize in two passes.")
    grid = None if step is None or center is None else (step, center)
    mean, rstd = launch.moments(a, groups, epsilon) if groups else (None, None)
    norm = Norm("group" if groups else "layer", silu, mean, rstd, gamma, beta, gain, shift, epsilon)
    found = _room(a) if scale is None else scale
    codes = torch.empty(_padded(a, pads, padded_channels), dtype=torch.int8, device=a.device)
    numbers = Codes(highest, clip, symmetric, clips)
    probes, lows, highs = launch.quantize(
        codes, a, held, grid, found, zero, None, per, numbers, (pads[0], pads[2]), True, measures, norm
    )
    return codes, found if scale is None else found.new_empty(0), probes.sum(), lows, highs


def _fake_norm_quantize(
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, per: int, pads: list[int], padded_channels: int,
    highest: int, clip: float, symmetric: bool, clips: bool, measures: bool, groups: int, *rest: Any,
) -> Five:
    found = a.shape[:-1].numel() if scale is None else 0
    return _fakes(a, pads, padded_channels, found, whole=per == launch.TOKEN or not groups, measures=measures)


def _fakes(a: Tensor, pads: list[int], padded_channels: int, found: int, whole: bool, measures: bool) -> Five:
    shape = _padded(a, pads, padded_channels)
    parts = launch.parts_of(shape, a.device, whole) if measures else 0
    numbers = [a.new_empty(size, dtype=torch.float32) for size in ((found,), (), (a.shape[0], parts))]
    return a.new_empty(shape, dtype=torch.int8), numbers[0], numbers[1], numbers[2], torch.empty_like(numbers[2])


def _room(a: Tensor) -> Tensor:
    """For the scales of tokens."""
    return torch.empty(a.shape[:-1].numel(), dtype=torch.float32, device=a.device)


def _scales(
    lows: Tensor, highs: Tensor, step: Tensor | None, highest: int, clip: float, symmetric: bool, margin: float
) -> tuple[Tensor, Tensor]:
    """Scales and zero points from ranges of the previous evaluation, widened by a margin.

    Args:
        lows: float32 ``[sets, parts]``.
        highs: float32 ``[sets, parts]``.
        step: Of an int16 grid.
        highest: Code.
        clip: Share of the range.
        symmetric: The zero points are then empty.
        margin: By which the ranges are widened.
    """
    scale, zero, _ = launch.scales(lows, highs, step, Codes(highest, clip, symmetric, True), margin)
    return scale, scale.new_empty(0) if zero is None else zero


def _fake_scales(
    lows: Tensor, highs: Tensor, step: Tensor | None, highest: int, clip: float, symmetric: bool, margin: float
) -> tuple[Tensor, Tensor]:
    return lows.new_empty(lows.shape[0]), lows.new_empty(0 if symmetric else lows.shape[0])
# fmt: on


def _product(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    code_scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    columns: int,
) -> Tensor:
    """``code scale · weight scale · sum + bias``, float32; see :func:`modiff.kernels.triton.launch.product`.

    Args:
        codes: int8 ``[rows, depth]``, or ``[batch, padded height, padded width, channels]``.
        weight: int8 ``[padded columns, ...]``.
        weight_scale: float32 ``[columns]``.
        code_scale: float32; None: 1.
        bias: float32 ``[columns]``.
        stride: Of a convolution.
        columns: Output channels.
    """
    output = torch.empty(_output(codes, weight, stride, columns), dtype=torch.float32, device=codes.device)
    launch.product(output, codes, weight, weight_scale, code_scale, bias, stride, adds=False)
    return output


def _fake_product(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    code_scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    columns: int,
) -> Tensor:
    return codes.new_empty(_output(codes, weight, stride, columns), dtype=torch.float32)


def _product_(
    o_hat: Tensor,
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    code_scale: Tensor | None,
    stride: int,
) -> None:
    """Equation (14) at the end of the product: ``ô += code scale · weight scale · sum``, in place.

    Args:
        o_hat: ô, any float, contiguous with its channels last.
        codes: See :func:`_product`, like the rest.
        weight: Likewise.
        weight_scale: Likewise.
        code_scale: Likewise.
        stride: Likewise.
    """
    launch.product(o_hat, codes, weight, weight_scale, code_scale, None, stride, adds=True)


def _fake_product_(
    o_hat: Tensor,
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    code_scale: Tensor | None,
    stride: int,
) -> None:
    return None


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the GPU of the first tensor: Triton takes the current one."""

    @functools.wraps(run)
    def guarded(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


def _padded(a: Tensor, pads: list[int], channels: int) -> list[int]:
    return [a.shape[0], a.shape[1] + pads[0] + pads[1], a.shape[2] + pads[2] + pads[3], channels]


def _output(codes: Tensor, weight: Tensor, stride: int, columns: int) -> list[int]:
    if codes.ndim == 2:
        return [codes.shape[0], columns]
    size = [(codes.shape[d] - weight.shape[d]) // stride + 1 for d in (1, 2)]
    return [codes.shape[0], *size, columns]


_SCALE = "Tensor? scale, Tensor? zero"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "triton_quantize": (
        f"(Tensor a, Tensor(a!)? held, {_GRID}, {_SCALE}, Tensor? units, int per, int[] pads, int padded_channels, "
        f"{_NUMBERS}, bool compensates, bool measures) -> {_FIVE}",
        _quantize,
        _fake_quantize,
    ),
    "triton_norm_quantize": (
        f"(Tensor a, Tensor(a!)? held, {_GRID}, {_SCALE}, int per, int[] pads, int padded_channels, {_NUMBERS}, "
        "bool measures, int groups, float epsilon, Tensor? gamma, Tensor? beta, Tensor? gain, Tensor? shift, "
        f"bool silu) -> {_FIVE}",
        _norm_quantize,
        _fake_norm_quantize,
    ),
    "triton_scales": (
        "(Tensor lows, Tensor highs, Tensor? step, int highest, float clip, bool symmetric, float margin) "
        "-> (Tensor, Tensor)",
        _scales,
        _fake_scales,
    ),
    "triton_product": (
        "(Tensor codes, Tensor weight, Tensor weight_scale, Tensor? code_scale, Tensor? bias, int stride, int columns) "
        "-> Tensor",
        _product,
        _fake_product,
    ),
    "triton_product_": (
        "(Tensor(a!) o_hat, Tensor codes, Tensor weight, Tensor weight_scale, Tensor? code_scale, int stride) -> ()",
        _product_,
        _fake_product_,
    ),
}
# Defined piece by piece: torch.library.custom_op wraps each call in Python code for gradients, ten times as slow.
_LIBRARY = torch.library.Library("modiff", "FRAGMENT")
for _name, (_schema, _run, _fake) in _OPERATORS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _on_its_device(_run), "CUDA")
    if launch.INTERPRETED:
        _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"modiff::{_name}", _fake, lib=_LIBRARY)
quantize = torch.ops.modiff.triton_quantize.default
norm_quantize = torch.ops.modiff.triton_norm_quantize.default
scales = torch.ops.modiff.triton_scales.default
product = torch.ops.modiff.triton_product.default
product_ = torch.ops.modiff.triton_product_.default
