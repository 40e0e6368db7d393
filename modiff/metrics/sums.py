"""Sums that do not depend on the order of batches, nor on how ranks share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def empty(*shape: int) -> Tensor:
    """A sum of nothing: float64 ``[2, *shape]``, the sum and what rounding has cut off it so far."""
    return torch.zeros(2, *shape, dtype=torch.float64)


def add(total: Tensor, value: Tensor) -> Tensor:
    """``total + value`` with twice the digits of float64 (Knuth's TwoSum), so that the order leaves no trace.

    Args:
        total: Of :func:`empty`, ``[2, *shape]``.
        value: Float64 ``[*shape]``.

    >>> total = empty()
    >>> for term in (1e16, 1.0, -1e16):
    ...     total = add(total, torch.tensor(term, dtype=torch.float64))
    >>> float(value(total))
    1.0
    """
    high, low = _two_sum(total[0], value)
    return torch.stack(_two_sum(high, low + total[1]))


def merge(totals: Tensor) -> Tensor:
    """The sum of the ranks' sums ``[ranks, 2, *shape]``; ``dist_reduce_fx`` of a torchmetrics state."""
    merged = totals[0]
    for total in totals[1:]:
        merged = add(merged, total[0])
        merged = add(merged, total[1])
    return merged


def value(total: Tensor) -> Tensor:
    """What a sum comes to: float64 ``[*shape]``."""
    return total[0] + total[1]


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a + b`` rounded, and exactly what the rounding lost."""
    rounded = a + b
    part = rounded - a
    return rounded, (a - (rounded - part)) + (b - part)


class MeanOverImages(Metric):
    """Mean of a figure that every image has, the same on any number of ranks.

    torchmetrics' ``MeanMetric`` adds the ranks' float sums in the order of the ranks, so that its last bit depends on
    who drew what; here it does not.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", empty(), dist_reduce_fx=merge)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Take the figures ``[N]`` of a batch; N may be 0."""
        self.total = add(self.total, values.to(self.total.device).double().sum())
        self.count = self.count + values.numel()

    def compute(self) -> float | None:
        """The mean; None where there was no image."""
        return float(value(self.total)) / int(self.count) if int(self.count) else None
