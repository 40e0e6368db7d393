"""How weights are rounded to codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config import QuantSpec
from modiff.quantizers.affine import dequantize, quantize, scale_from_range
from modiff.quantizers.granularity import weight_partition


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes of a weight with what turns them back into values.

    Args:
        codes: Floats holding whole numbers, ``[out, in / groups, *kernel]``.
        scale: Broadcasts against the codes.
        zero_point: Likewise; None when symmetric.
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
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    partition = weight_partition(spec)
    scale, zero_point = scale_from_range(*partition.range(weight), spec)
    count = scale.numel()
    scale = partition.expand(scale, weight.shape)
    zero_point = None if zero_point is None else partition.expand(zero_point, weight.shape)
    return QuantizedWeight(quantize(weight, scale, zero_point, spec), scale, zero_point, count)
