"""Simulated execution: floating point on quantized values. The definition that every other backend must meet."""

from __future__ import annotations

from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.quantizers.affine import scale_from_range
from modiff.quantizers.granularity import Partition


def encode_(
    x: Tensor,
    partition: Partition,
    spec: QuantSpec,
    clip: float | None = None,
    fixed: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Replace ``x`` by its codes less their zero point (equation 4), in place.

    The same codes as :func:`modiff.quantizers.affine.quantize`, in as few passes over memory as eager mode has.

    Args:
        x: Float32 or float64, any memory layout; overwritten.
        partition: Which elements share a scale.
        spec: The quantizer.
        clip: Overrides ``spec.clip``.
        fixed: Calibrated scale and zero point, broadcasting against ``x``; None: from the range of ``x``.

    Returns:
        The scale, broadcasting against ``x``; a scalar that is NaN or Inf where ``x`` held either.
    """
    clip = spec.clip if clip is None else clip
    if fixed is None:
        low, high = partition.range(x)
        probe = (high - low).sum()
        scale, zero_point = scale_from_range(low, high, spec, clip)
        scale = partition.expand(scale, x.shape)
        zero_point = None if zero_point is None else partition.expand(zero_point, x.shape)
    else:
        probe = x.sum()  # clamping would hide an Inf
        scale, zero_point = fixed
    x.div_(scale).round_()
    if zero_point is not None:
        x.add_(zero_point).clamp_(*spec.code_range).sub_(zero_point)
    elif clip < 1 or fixed is not None:  # at the full range no value can round beyond the last code
        x.clamp_(*spec.code_range)
    return scale, probe


def fake_quantize_(
    x: Tensor,
    partition: Partition,
    spec: QuantSpec,
    clip: float | None = None,
    fixed: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Replace ``x`` by ``Q(x)`` (equations 4 and 5), in place; see :func:`encode_`.

    Returns:
        A scalar that is NaN or Inf where ``x`` held either.
    """
    scale, probe = encode_(x, partition, spec, clip, fixed)
    x.mul_(scale)
    return probe
