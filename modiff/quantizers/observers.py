"""Statistics from which calibrated ranges are made, for each bucket of time steps and each set that shares a scale.

Every observer merges with others of its kind: in any order and grouping, the merged one is what a single observer would
be that had seen everything. So it does not matter how data are dealt to ranks, nor in which order they come.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError
from modiff.quantizers.affine import dequantize, quantize, scale_from_range
from modiff.quantizers.rounding import RATIOS

Exchange = Generator[tuple[Tensor, str], Tensor, None]
"""Yields a tensor and how it is reduced (``sum``, ``min``, ``max``); is sent the reduced one."""

AllReduce = Callable[[Tensor, str], Tensor]
"""Reduces a tensor over all ranks by ``sum``, ``min`` or ``max``, and returns the result to each."""

LOWEST_EXPONENT = -100
"""Magnitudes below 2^-100 share the narrowest bins."""


class Observer(ABC):
    """Running statistics of values, in memory that does not grow.

    Args:
        buckets: Buckets of time steps.
        sets: Sets of values that get a scale of their own.

    Attributes:
        order_free: Whether merging in any order and grouping gives the same bits.
    """

    order_free = True

    def __init__(self, buckets: int, sets: int) -> None:
        self.shape = (buckets, sets)

    @abstractmethod
    def update(self, bucket: int, first: int, values: Tensor) -> None:
        """Add values.

        Args:
            bucket: Their bucket.
            first: The first set that they belong to.
            values: Finite floats ``[samples, S, n]`` of the sets ``first`` to ``first + S - 1``.
        """

    @abstractmethod
    def exchange(self) -> Exchange:
        """The tensors that the observer consists of, to be reduced over ranks; it continues with what it is sent."""

    @abstractmethod
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Ends of the range ``[buckets, sets]`` for a quantizer, float32; of buckets without data (inf, -inf)."""

    def merge(self, other: Observer) -> None:
        """Add what another observer has seen; the other one stays as it is."""
        mine, theirs = self.exchange(), copy.deepcopy(other).exchange()
        how: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "sum": torch.add,
            "min": torch.minimum,
            "max": torch.maximum,
        }
        try:
            (a, op), (b, _) = next(mine), next(theirs)
            while True:
                merged = how[op](a, b)
                (a, op), (b, _) = mine.send(merged), theirs.send(merged.clone())
        except StopIteration:
            pass

    def reduce(self, all_reduce: AllReduce) -> None:
        """Merge over ranks: afterwards every rank's observer has seen what all have."""
        mine = self.exchange()
        try:
            tensor, op = next(mine)
            while True:
                tensor, op = mine.send(all_reduce(tensor, op))
        except StopIteration:
            pass


class MinMax(Observer):
    """Smallest and largest values. Merges exactly: minimum of minima, maximum of maxima."""

    def __init__(self, buckets: int, sets: int) -> None:
        super().__init__(buckets, sets)
        self.low = torch.full(self.shape, float("inf"))
        self.high = torch.full(self.shape, -float("inf"))

    @override
    def update(self, bucket: int, first: int, values: Tensor) -> None:
        sets = slice(first, first + values.shape[1])
        self.low[bucket, sets] = torch.minimum(self.low[bucket, sets], values.amin(dim=(0, 2)).float().cpu())
        self.high[bucket, sets] = torch.maximum(self.high[bucket, sets], values.amax(dim=(0, 2)).float().cpu())

    @override
    def exchange(self) -> Exchange:
        self.low = yield self.low, "min"
        self.high = yield self.high, "max"

    @override
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverage(Observer):
    """Mean over samples of the smallest and largest value of each: the cumulative moving average.

    An exponential average weights what came last, and so depends on the order of the data, which ranks do not have;
    this one does not. Merges by sums: exactly, as long as they fit in float64 (up to 2^29 samples of similar size).
    """

    order_free = False

    def __init__(self, buckets: int, sets: int) -> None:
        super().__init__(buckets, sets)
        self.low_sum = torch.zeros(self.shape, dtype=torch.float64)
        self.high_sum = torch.zeros(self.shape, dtype=torch.float64)
        self.count = torch.zeros(self.shape, dtype=torch.int64)

    @override
    def update(self, bucket: int, first: int, values: Tensor) -> None:
        sets = slice(first, first + values.shape[1])
        self.low_sum[bucket, sets] += values.amin(dim=2).double().sum(dim=0).cpu()
        self.high_sum[bucket, sets] += values.amax(dim=2).double().sum(dim=0).cpu()
        self.count[bucket, sets] += len(values)

    @override
    def exchange(self) -> Exchange:
        self.low_sum = yield self.low_sum, "sum"
        self.high_sum = yield self.high_sum, "sum"
        self.count = yield self.count, "sum"

    @override
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        seen, count = self.count > 0, self.count.clamp(min=1)
        low, high = (self.low_sum / count).float(), (self.high_sum / count).float()
        return low.masked_fill(~seen, float("inf")), high.masked_fill(~seen, -float("inf"))


class Histogram(MinMax):
    """Counts of values in bins of equal width, which is a power of two.

    The bins of a set reach as far as its largest magnitude asks for: when that grows, pairs of bins become one. As the
    widths are powers of two, the counts are those that bins of the final width would have had from the beginning, so
    merging is exact, bit for bit, and edges need not be agreed upon.

    Args:
        buckets: As for :class:`Observer`.
        sets: As for :class:`Observer`.
        bins: Even; half of them for negative values.
    """

    def __init__(self, buckets: int, sets: int, bins: int) -> None:
        super().__init__(buckets, sets)
        self.bins = bins
        self.exponent = torch.full(self.shape, LOWEST_EXPONENT, dtype=torch.int64)  # magnitudes are below 2^exponent
        self.counts = torch.zeros((*self.shape, bins), dtype=torch.int64)

    @property
    def width(self) -> Tensor:
        """Width of a bin, float64 ``[buckets, sets]``."""
        return 2.0 ** self.exponent.double() / (self.bins // 2)

    @override
    def update(self, bucket: int, first: int, values: Tensor) -> None:
        super().update(bucket, first, values)
        size = values.shape[1]
        sets = slice(first, first + size)
        values = values.double().cpu()
        needed = self.exponent.clone()
        peak = values.abs().amax(dim=(0, 2))
        found = torch.frexp(peak).exponent.long().where(peak > 0, torch.tensor(LOWEST_EXPONENT))
        needed[bucket, sets] = torch.maximum(needed[bucket, sets], found)
        self._widen(needed)
        # Division by a power of two is exact.
        places = (values / self.width[bucket, sets, None]).floor_().long() + self.bins // 2
        places += self.bins * torch.arange(size)[:, None]
        self.counts[bucket, sets] += torch.bincount(places.flatten(), minlength=size * self.bins).view(size, self.bins)

    @override
    def exchange(self) -> Exchange:
        yield from super().exchange()
        self._widen((yield self.exponent, "max"))
        self.counts = yield self.counts, "sum"

    def _widen(self, exponent: Tensor) -> None:
        """Make bins wider where ``exponent`` is larger; from the middle, pairs of bins become one each time."""
        steps = exponent - self.exponent
        for index in steps.nonzero().tolist():
            bucket, one = index
            counts = self.counts[bucket, one]
            places = torch.arange(self.bins) - self.bins // 2
            if counts.any():
                shift = min(int(steps[bucket, one]), 62)
                merged = torch.zeros_like(counts)
                merged.index_add_(0, (places >> shift) + self.bins // 2, counts)
                self.counts[bucket, one] = merged
        self.exponent = exponent.clone()


class Percentile(Histogram):
    """The range that holds a percentage of the values, as many left out at either end; found in a histogram.

    Args:
        buckets: As for :class:`Observer`.
        sets: As for :class:`Observer`.
        bins: Of each histogram; even.
        percentile: More than 0 and at most 100, which is the full range.
    """

    def __init__(self, buckets: int, sets: int, bins: int, percentile: float) -> None:
        super().__init__(buckets, sets, bins)
        self.percentile = percentile

    @override
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        left_out = (self.counts.sum(dim=2).double() * ((100 - self.percentile) / 200)).floor().long()[..., None]
        first = (self.counts.cumsum(dim=2) > left_out).int().argmax(dim=2)
        last = (self.counts.flip(2).cumsum(dim=2) > left_out).int().argmax(dim=2)
        half = self.bins // 2
        low, high = (first - half) * self.width, (half - last) * self.width
        return torch.maximum(low.float(), self.low), torch.minimum(high.float(), self.high)


class Lp(Histogram):
    """The share of the full range, from 1 down to .2, whose rounding and clipping errors have the least Lp norm.

    Values count as the middles of their bins. Scale and zero point come from the same share.

    Args:
        buckets: As for :class:`Observer`.
        sets: As for :class:`Observer`.
        bins: Of each histogram; even.
        p: 2.4 as in Q-Diffusion's reference code; 2 is the mean squared error.
    """

    def __init__(self, buckets: int, sets: int, bins: int, p: float) -> None:
        super().__init__(buckets, sets, bins)
        self.p = p

    @override
    def range(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        rows = [self._best_share(bucket, spec) for bucket in range(self.shape[0])]
        share = torch.stack(rows).float()
        return self.low * share, self.high * share

    def _best_share(self, bucket: int, spec: QuantSpec) -> Tensor:
        """The best share for each set of a bucket, ``[sets]``."""
        low, high = self.low[bucket].double()[:, None], self.high[bucket].double()[:, None]
        seen = torch.isfinite(low)
        low, high = low.where(seen, torch.zeros(())), high.where(seen, torch.zeros(()))
        middles = (torch.arange(self.bins) - self.bins // 2 + 0.5) * self.width[bucket][:, None]
        middles = torch.minimum(torch.maximum(middles, low), high)
        best, chosen = torch.full_like(low[:, 0], float("inf")), torch.ones_like(low[:, 0])
        for step in range(RATIOS):
            share = 1 - 0.8 * step / (RATIOS - 1)
            scale, zero_point = scale_from_range(low, high, spec, clip=share)
            error = (dequantize(quantize(middles, scale, zero_point, spec), scale, zero_point) - middles).abs_()
            loss = (error.pow_(self.p) * self.counts[bucket]).sum(dim=1)
            chosen = torch.where(loss < best, share, chosen)
            best = torch.minimum(loss, best)
        return chosen


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": lambda buckets, sets, **_: MinMax(buckets, sets),
    "moving_average": lambda buckets, sets, **_: MovingAverage(buckets, sets),
    "percentile": lambda buckets, sets, bins, percentile, **_: Percentile(buckets, sets, bins, percentile),
    "lp": lambda buckets, sets, bins, p, **_: Lp(buckets, sets, bins, p),
}


def make_observer(
    kind: str, buckets: int, sets: int, *, bins: int = 2048, percentile: float = 99.9, p: float = 2.4
) -> Observer:
    """An observer by name: ``minmax``, ``moving_average``, ``percentile`` or ``lp``.

    Raises:
        ConfigError: There is none of that name.
    """
    if kind not in OBSERVERS:
        raise ConfigError(f"ranges is {kind!r}; allowed are {', '.join(OBSERVERS)}.")
    options: dict[str, Any] = {"bins": bins, "percentile": percentile, "p": p}
    return OBSERVERS[kind](buckets, sets, **options)


def observer_bytes(kind: str, buckets: int, sets: int, bins: int = 2048) -> int:
    """Bytes that an observer holds."""
    return buckets * sets * (8 * bins + 16 if kind in ("percentile", "lp") else 24)
