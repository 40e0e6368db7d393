"""Affine quantization: scale and zero point from a range, codes from values (equations 4 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.quantizers.granularity import Partition


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
