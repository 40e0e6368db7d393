"""How weights are rounded to codes: nearest, nearest with searched scales, and the soft rounding of AdaRound."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modiff.config.specs import QuantSpec
from modiff.quantizers.affine import dequantize, quantize, scale_from_range
from modiff.quantizers.granularity import weight_partition

STRETCH = (-0.1, 1.1)
"""Ends γ and ζ of the stretched sigmoid (Nagel et al. 2020, equation 23)."""
RATIOS = 80
"""Shares of the full range that :func:`lp_scale` tries, evenly from 1 down to .2."""


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight with what turns them back into values.

    Args:
        codes: Floats holding whole numbers, ``[out, in / groups, *kernel]``.
        scale: Broadcasts against the codes.
        zero_point: Broadcasts against the codes; None when symmetric.
        num_scales: How many scales are stored.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    num_scales: int

    def dequantize(self) -> Tensor:
        """The values in the shape of the weight, float32 (float64 for float64 weights)."""
        return dequantize(self.codes, self.scale, self.zero_point)


def round_nearest(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Round a weight ``[out, in / groups, *kernel]`` to the nearest codes, half to even."""
    weight = _float(weight)
    return _round(weight, *scale_from_range(*weight_partition(spec).range(weight), spec), spec)


def round_lp(weight: Tensor, spec: QuantSpec, p: float = 2.4) -> QuantizedWeight:
    """Round to the nearest codes of the scales that lose least in the Lp norm (:func:`lp_scale`)."""
    weight = _float(weight)
    return _round(weight, *lp_scale(weight, spec, p), spec)


def lp_scale(weight: Tensor, spec: QuantSpec, p: float = 2.4) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point, of the range whose rounding errors have the smallest Lp norm, for each set of the weight.

    The range is the full one times a ratio from 1 down to .2; scale and zero point are taken from the same ratio.

    Args:
        weight: ``[out, in / groups, *kernel]``, float32 or float64.
        spec: The quantizer.
        p: 2.4 as in Q-Diffusion's reference code; 2 is the mean squared error.
    """
    partition = weight_partition(spec)
    low, high = partition.range(weight)
    best: Tensor | None = None
    chosen_scale, chosen_zero = scale_from_range(low, high, spec)
    for step in range(RATIOS):
        scale, zero_point = scale_from_range(low, high, spec, clip=spec.clip * (1 - 0.8 * step / (RATIOS - 1)))
        error = (_round(weight, scale, zero_point, spec).dequantize() - weight).abs_().pow_(p)
        loss = partition.sum(error)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss < best
        best = loss if best is None else torch.where(better, loss, best)
        chosen_scale = torch.where(better, scale, chosen_scale)
        if zero_point is not None and chosen_zero is not None:
            chosen_zero = torch.where(better, zero_point, chosen_zero)
    return chosen_scale, chosen_zero


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V) = clip(sigmoid(V) (ζ - γ) + γ, 0, 1)`` (Nagel et al. 2020, equation 23).

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def rounding_penalty(h: Tensor, beta: float) -> Tensor:
    """``f_reg = sum(1 - |2 h - 1|^β)`` (Nagel et al. 2020, equation 24): 0 where every ``h`` is 0 or 1."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@dataclass(frozen=True)
class SoftRounding:
    """A weight whose codes lie anywhere between the two neighbours (Nagel et al. 2020, equation 22).

    Args:
        floor: Lower code of each element before clamping, the zero point not added.
        grid: Scales and zero points; its codes are those of rounding to nearest.
        spec: The quantizer.
    """

    floor: Tensor
    grid: QuantizedWeight
    spec: QuantSpec

    @classmethod
    def of(cls, weight: Tensor, grid: QuantizedWeight, spec: QuantSpec) -> tuple[SoftRounding, Tensor]:
        """The soft rounding of a weight on given scales, and the ``V`` at which its values are the weight's own.

        Elements beyond the last code have the last code as their value, whatever ``V`` is.
        """
        ratio = _float(weight) / grid.scale
        floor = ratio.floor()
        low, high = STRETCH
        v = -torch.log((high - low) / (ratio - floor - low) - 1)
        return cls(floor, grid, spec), v

    def soft(self, v: Tensor) -> Tensor:
        """Values with ``h(V)`` added to the lower codes; differentiable in ``v``."""
        return self._values(rectified_sigmoid(v))[1]

    def hard(self, v: Tensor) -> QuantizedWeight:
        """The weight with each code rounded to where its ``V`` points: up where ``h(V)`` is at least a half."""
        return replace(self.grid, codes=self._values((v >= 0).to(v.dtype))[0])

    def _values(self, up: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.floor + up
        if self.grid.zero_point is not None:
            codes = codes + self.grid.zero_point
        codes = codes.clamp(*self.spec.code_range)
        return codes, dequantize(codes, self.grid.scale, self.grid.zero_point)


def _float(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _round(weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> QuantizedWeight:
    partition, count = weight_partition(spec), scale.numel()
    scale = partition.expand(scale, weight.shape)
    zero_point = None if zero_point is None else partition.expand(zero_point, weight.shape)
    return QuantizedWeight(quantize(weight, scale, zero_point, spec), scale, zero_point, count)
