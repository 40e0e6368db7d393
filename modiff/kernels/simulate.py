"""Simulated execution: floating point on quantized values. The definition that every other backend must meet."""

from __future__ import annotations

from torch import Tensor

from modiff.config import QuantSpec
from modiff.quantizers.affine import scale_from_range
from modiff.quantizers.granularity import Partition


def fake_quantize_(
    x: Tensor, partition: Partition, spec: QuantSpec, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Replace ``x`` by ``Q(x)`` (equations 4 and 5) with a dynamic range, in place.

    The same values as :func:`modiff.quantizers.affine.fake_quantize`, in as few passes over memory as eager mode has.

    Args:
        x: Float32 or float64, any memory layout; overwritten.
        partition: Which elements share a scale.
        spec: The quantizer.
        clip: Overrides ``spec.clip``.

    Returns:
        Smallest and largest values found, for the detection of NaN and Inf without another pass.
    """
    clip = spec.clip if clip is None else clip
    low, high = partition.range(x)
    scale, zero_point = scale_from_range(low, high, spec, clip)
    scale = partition.expand(scale, x.shape)
    x.div_(scale).round_()
    if zero_point is not None:
        zero_point = partition.expand(zero_point, x.shape)
        x.add_(zero_point).clamp_(*spec.code_range).sub_(zero_point)
    elif clip < 1:  # at the full range no value can round beyond the last code
        x.clamp_(*spec.code_range)
    x.mul_(scale)
    return low, high


def fake_quantize_fixed_(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Replace ``x`` by ``Q(x)`` (equations 4 and 5) with a calibrated scale, in place; codes are clamped.

    Args:
        x: Float32 or float64, any memory layout; overwritten.
        scale: Broadcasts against ``x``.
        zero_point: Likewise; None for symmetric quantizers.
        spec: The quantizer.

    Returns:
        A scalar that is NaN or Inf where ``x`` held either: clamping would hide an Inf.
    """
    probe = x.sum()
    x.div_(scale).round_()
    if zero_point is None:
        x.clamp_(*spec.code_range)
    else:
        x.add_(zero_point).clamp_(*spec.code_range).sub_(zero_point)
    x.mul_(scale)
    return probe
