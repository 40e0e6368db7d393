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

Three = tuple[Tensor, Tensor, Tensor]


# fmt: off
def _quantize(  # noqa: D417 (the launchers describe what they take)
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, last: Tensor | None, per: int, pads: list[int], padded_channels: int,
    highest: int, clip: float, symmetric: bool, clips: bool, compensates: bool, exponent: int = 0,
    margin: float = 1.0, groups: int = -1, epsilon: float = 0.0, mul: Tensor | None = None, add: Tensor | None = None,
    offset: Tensor | None = None, activation: str | None = None,
) -> Three:
    """Equations (4), (5) and (13), in as few passes as the scale allows, of ``a`` or of what a norm makes of it.

    The scale may be known, per token (one pass), from the range of this evaluation (two), or from that of the
    evaluation before (one; another where the residual does not fit).

    Args:
        a: Any float ``[samples, height, width, channels]``; see :func:`modiff.kernels.triton.launch.strides`.
        held: â, likewise, float or int16; advanced in place.
        step: Of the int16 grid, like ``center``.
        scale: See :func:`modiff.kernels.triton.launch.quantize`, like zero and per; None: to be found.
        zero: Zero points.
        last: The range of the evaluation before, float32 ``[3, sets]``; replaced by this one's. None: not used.
        per: Which elements share a scale.
        pads: Zeros above, below, left and right of the image.
        padded_channels: Channels of the codes.
        highest: See :class:`modiff.kernels.triton.launch.Codes`, like clip, symmetric and clips.
        compensates: See :class:`modiff.quantizers.held.Held`.
        exponent: The largest, where scales are powers of two times one per sample.
        margin: By which the range of the evaluation before is widened.
        groups: Of a GroupNorm before the quantizer; 0: a LayerNorm; -1: no norm.
        epsilon: See :class:`modiff.kernels.triton.launch.Norm`, like the rest.

    Returns:
        Codes less their zero point, int8 ``[samples, padded height, padded width, padded channels]``; the scale that
        was found, float32, of what one code is worth in the container, empty where it was known; a scalar that is NaN
        where ``a`` is not finite.
    """
    numbers = Codes(highest, clip, symmetric, clips)
    grid = None if step is None or center is None else (step, center)
    norm = _norm(a, groups, epsilon, mul, add, offset, activation)
    codes = torch.empty(_padded(a, pads, padded_channels), dtype=torch.int8, device=a.device)
    write = functools.partial(
        launch.quantize, codes, a, held, grid, per=per, numbers=numbers, pads=(pads[0], pads[2]),
        compensates=compensates, norm=norm,
    )
    if scale is not None:
        return codes, scale.new_empty(0), write(scale, zero, None)[0].sum()
    if per == launch.TOKEN:
        scale = torch.empty(a.shape[:-1].numel(), dtype=torch.float32, device=a.device)
        return codes, scale, write(scale, None, None)[0].sum()
    if last is not None:
        return codes, *_after(write, last, step, numbers, margin)
    lows, highs = launch.ranges(a, held, grid, per == launch.SAMPLE_CHANNEL, norm)
    if per == launch.SAMPLE_CHANNEL:
        scale, zero, power, unit, probes = launch.shared_scales(lows, highs, step, numbers, exponent)
        write(scale, zero, power)
        return codes, unit, probes.sum()
    sets = 1 if per == launch.TENSOR else a.shape[0]
    scale, zero, probes = launch.scales(lows.view(sets, -1), highs.view(sets, -1), step, numbers)
    write(scale, zero, None)
    return codes, scale, probes.sum()


def _norm(
    a: Tensor, groups: int, epsilon: float, mul: Tensor | None, add: Tensor | None, offset: Tensor | None,
    activation: str | None,
) -> Norm:
    """What stands before, with the moments of a GroupNorm."""
    mean, rstd = launch.moments(a, groups, epsilon, offset) if groups > 0 else (None, None)
    kind = "none" if groups < 0 else "group" if groups else "layer"
    return Norm(kind, activation, mean, rstd, mul, add, offset, epsilon)


def _after(
    write: Callable[..., Three], last: Tensor, step: Tensor | None, numbers: Codes, margin: float
) -> tuple[Tensor, Tensor]:
    """Codes with the scale of the evaluation before, made anew where they do not hold the residual; scale and probe."""
    before = launch.scales(last[0][:, None], last[1][:, None], step, numbers, margin)[:2]
    probes, *found = write(*before, None, measures=True, known=last[2])
    lows, highs = (t.view(last.shape[1], -1) for t in found)
    scale, zero, again = launch.settle((lows, highs), before, last, step, numbers, margin)
    write(scale, zero, None, again=(again, before[0]))
    return scale, probes.sum()


def _fake_quantize(
    a: Tensor, held: Tensor | None, step: Tensor | None, center: Tensor | None,
    scale: Tensor | None, zero: Tensor | None, last: Tensor | None, per: int, pads: list[int], padded_channels: int,
    *rest: Any,
) -> Three:
    sets = {launch.TENSOR: 1, launch.TOKEN: a.shape[:-1].numel()}.get(per, a.shape[0])
    found = sets if scale is None else 0
    codes = a.new_empty(_padded(a, pads, padded_channels), dtype=torch.int8)
    return codes, a.new_empty(found, dtype=torch.float32), a.new_empty((), dtype=torch.float32)
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


_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "triton_quantize": (
        "(Tensor a, Tensor(a!)? held, Tensor? step, Tensor? center, Tensor? scale, Tensor? zero, Tensor(b!)? last, "
        "int per, int[] pads, int padded_channels, int highest, float clip, bool symmetric, bool clips, "
        "bool compensates, int exponent=0, float margin=1.0, int groups=-1, float epsilon=0.0, Tensor? mul=None, "
        "Tensor? add=None, Tensor? offset=None, str? activation=None) -> (Tensor, Tensor, Tensor)",
        _quantize,
        _fake_quantize,
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
product = torch.ops.modiff.triton_product.default
product_ = torch.ops.modiff.triton_product_.default
