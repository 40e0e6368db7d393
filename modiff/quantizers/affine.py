"""Affine quantization: scale and zero point from a range, codes from values (equations 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.quantizers.granularity import Partition


@dataclass(frozen=True)
class Limits:
    """Numbers of a quantizer as tensors: ``torch.compile`` would make a graph for each Python float.

    Args:
        top: Highest code, 0-dim.
        clip: Share of the range that is kept, 0-dim.
        factor: ``clip / top``, rounded as eager mode rounds it.
        symmetric: Codes -top..top; else 0..top with a zero point.
        clips: Codes can fall outside: clipped, or a range that is not the residual's own.
        codes: Lowest and highest code as Python numbers, for eager mode and for kernels of other languages.
        ratio: ``clip`` as a Python number.
    """

    top: Tensor
    clip: Tensor
    factor: Tensor
    symmetric: bool
    clips: bool
    codes: tuple[int, int]
    ratio: float

    @classmethod
    def of(cls, spec: QuantSpec, like: Tensor, clip: float | None = None, fixed: bool = False) -> Limits:
        """Those of a quantizer, in the dtype and on the device of ``like``.

        Args:
            spec: The quantizer.
            like: A tensor.
            clip: Overrides ``spec.clip`` (1.0 in the first evaluation of a trajectory).
            fixed: Scales are calibrated.
        """
        clip, top = spec.clip if clip is None else clip, spec.code_range[1]
        made = [torch.tensor(value, dtype=like.dtype, device=like.device) for value in (top, clip, clip / top)]
        return cls(made[0], made[1], made[2], spec.symmetric, clip < 1 or fixed, spec.code_range, clip)


def scale_from_range(
    low: Tensor, high: Tensor, spec: QuantSpec, clip: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point of an asymmetric quantizer, from the smallest and largest values.

    Args:
        low: Smallest values, any shape, float.
        high: Largest values, same shape.
        spec: The quantizer.
        clip: Overrides ``spec.clip`` (1.0 in the first evaluation of a trajectory).

    Returns:
        Scale (0 becomes 1; so do subnormal scales, which devices may flush to 0) and zero point (float holding whole
        numbers; None when symmetric), in the shape of ``low``.
    """
    clip = spec.clip if clip is None else clip
    top = spec.code_range[1]
    smallest = torch.finfo(low.dtype).tiny
    if spec.symmetric:
        scale = torch.maximum(-low, high) * (clip / top)
        return scale.masked_fill_(scale < smallest, 1.0), None
    low, high = low.clamp(max=0) * clip, high.clamp(min=0) * clip
    scale = (high - low) / top
    scale = scale.masked_fill_(scale < smallest, 1.0)
    return scale, (-low / scale).round_().clamp_(0, top)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of ``x`` (equation 4), as floats holding whole numbers; rounds half to even.

    ``scale`` and ``zero_point`` broadcast against ``x``.
    """
    codes = (x / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(*spec.code_range)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Values of codes (equation 5)."""
    return codes * scale if zero_point is None else (codes - zero_point) * scale


def fake_quantize(x: Tensor, partition: Partition, spec: QuantSpec, clip: float | None = None) -> Tensor:
    """``Q(x)``: quantize and dequantize with a dynamic range."""
    scale, zero_point = scale_from_range(*partition.range(x), spec, clip)
    scale = partition.expand(scale, x.shape)
    zero_point = None if zero_point is None else partition.expand(zero_point, x.shape)
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point)
