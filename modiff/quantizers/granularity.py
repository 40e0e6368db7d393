"""Which elements of a tensor share a scale: the one place that reduces and expands."""

from __future__ import annotations

import builtins
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """A partition of a tensor's elements into sets that share a scale.

    Args:
        keep: Dims that keep scales of their own; all others are reduced.
        group_dim: Dim of which ``group_size`` consecutive entries share a scale (it is also in ``keep``).
        group_size: Size of such a group; the last one may be short.
        shared: Dims that keep one scale of which those of the sets are powers of two; None: scales are any numbers.

    >>> x = torch.arange(12.0).reshape(2, 6)
    >>> Partition(keep=(0,)).range(x)
    (tensor([[0.],
            [6.]]), tensor([[ 5.],
            [11.]]))
    >>> Partition(keep=(0, 1), group_dim=1, group_size=4).range(x)[1]
    tensor([[ 3.,  5.],
            [ 9., 11.]])
    """

    keep: tuple[int, ...] = ()
    group_dim: int | None = None
    group_size: int | None = None
    shared: tuple[int, ...] | None = None

    def largest(self, scales: Tensor) -> Tensor:
        """The largest of the sets' scales that share one, keeping every dim.

        >>> Partition(keep=(0, 1), shared=(0,)).largest(torch.tensor([[1.0, 3.0], [5.0, 2.0]]))
        tensor([[3.],
                [5.]])
        """
        assert self.shared is not None
        dims = [dim for dim in builtins.range(scales.ndim) if dim not in self.shared]
        return scales.amax(dims, keepdim=True) if scales.numel() else scales.sum(dims, keepdim=True)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each set, keeping every dim (size 1, or the number of groups)."""
        x = self._split(x)
        dims = self._reduced(x.ndim)
        if x.numel() == 0:  # an empty batch: amin refuses it
            empty = self._join(x.new_zeros([1 if d in dims else n for d, n in enumerate(x.shape)]))
            return empty, empty
        if not dims:  # a copy: the caller may overwrite x
            same = x.clone()
            return same, same
        # Two reductions, not torch.aminmax: on the CPU that one is not vectorized and ten times slower.
        low, high = x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True)
        return self._join(low), self._join(high)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each set, in the shape of :meth:`range`.

        >>> Partition(keep=(0, 1), group_dim=1, group_size=4).sum(torch.ones(2, 6))
        tensor([[4., 2.],
                [4., 2.]])
        """
        x = self._split(x, repeat=False)
        dims = self._reduced(x.ndim)
        return self._join(x.sum(dim=dims, keepdim=True) if dims else x.clone())

    def expand(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """Make a scale broadcast against a tensor of ``shape``."""
        if self.group_dim is None or self.group_size is None:
            return scale
        size = min(self.group_size, shape[self.group_dim])
        repeated = scale.repeat_interleave(size, dim=self.group_dim)
        return repeated.narrow(self.group_dim, 0, shape[self.group_dim])

    def compact(self, expanded: Tensor) -> Tensor:
        """Undo :meth:`expand`: one entry for each set, in memory of its own."""
        if self.group_dim is None or self.group_size is None:
            return expanded.clone()
        index = (slice(None),) * self.group_dim + (slice(None, None, self.group_size),)
        return expanded[index].clone()

    def range_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the ranges of a tensor of ``shape``.

        >>> Partition(keep=(0, 1), group_dim=1, group_size=4).range_shape(torch.Size([2, 6, 3]))
        torch.Size([2, 2, 1])
        """
        sizes = [size if dim in self.keep else 1 for dim, size in enumerate(shape)]
        if self.group_dim is not None and self.group_size is not None:
            sizes[self.group_dim] = -(-shape[self.group_dim] // self.group_size)
        return torch.Size(sizes)

    def _reduced(self, ndim: int) -> tuple[int, ...]:
        if self.group_dim is None:
            return tuple(d for d in builtins.range(ndim) if d not in self.keep)
        # The split put the members of a group behind the group's own dim.
        keep = {d if d <= self.group_dim else d + 1 for d in self.keep}
        return tuple(d for d in builtins.range(ndim) if d not in keep)

    def _split(self, x: Tensor, repeat: bool = True) -> Tensor:
        if self.group_dim is None or self.group_size is None:
            return x
        size = min(self.group_size, x.shape[self.group_dim])  # a larger group is not filled up
        missing = -x.shape[self.group_dim] % size
        if (
            missing
        ):  # the last entry again changes neither minimum nor maximum of its group, zeros do not change its sum
            last = x.narrow(self.group_dim, x.shape[self.group_dim] - 1, 1)
            last = last if repeat else torch.zeros_like(last)
            x = torch.cat([x, *[last] * missing], dim=self.group_dim)
        return x.unflatten(self.group_dim, (-1, size))

    def _join(self, reduced: Tensor) -> Tensor:
        return reduced if self.group_dim is None else reduced.squeeze(self.group_dim + 1)


class Granularity(ABC):
    """What keeps a scale of its own: how tensors fall into sets that share one, and how many sets there are.

    Args:
        group_size: Channels in a group, for ``group``; the last one may be short.

    Attributes:
        name: As in a :class:`QuantSpec`.
        factors_out: All inputs of one output share a scale, so that it can be applied to an integer sum.
    """

    name: str
    factors_out = False

    def __init__(self, group_size: int | None = None) -> None:
        self.group_size = group_size

    @abstractmethod
    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """Partition of an operator's input.

        Args:
            ndim: Its number of dims.
            channel: The dim of its channels: the last one of a Linear's input, else 0 or 1.
            batched: Whether dim 0 counts samples; without it the whole input is one sample.

        Raises:
            ConfigError: The granularity does not exist for this operator.
        """

    def weight(self) -> Partition:
        """Partition of a weight ``[out, in / groups, *kernel]``."""
        raise ConfigError(f"granularity {self.name!r} does not exist for weights. Use tensor, channel or group.")

    def sets(self, channels: int) -> int:
        """How many scales the inputs of an operator have, where that does not depend on the batch."""
        return 1


class PerTensor(Granularity):
    """One scale for all elements."""

    name = "tensor"
    factors_out = True

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set."""
        return Partition()

    def weight(self) -> Partition:
        """One set."""
        return Partition()


class PerSample(Granularity):
    """One scale for each sample of a batch."""

    name = "sample"
    factors_out = True

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each row of the batch."""
        return Partition(keep=(0,) if batched else ())


class PerChannel(Granularity):
    """One scale for each input channel, shared by the batch; of a weight, for each output channel."""

    name = "channel"

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each channel."""
        return Partition(keep=(channel,))

    def weight(self) -> Partition:
        """One set for each output channel."""
        return Partition(keep=(0,))

    def sets(self, channels: int) -> int:
        """The channels."""
        return channels


class PerSampleAndChannel(Granularity):
    """One scale for each channel of each sample."""

    name = "sample_channel"

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each channel of each row."""
        return Partition(keep=(0, channel) if batched else (channel,))


class PerSampleAndChannelInPowers(PerSampleAndChannel):
    """Scales for each channel of each sample that are powers of two times one scale of the sample.

    Where each sample is one vector, every number would get a scale of its own: there it is one for each sample.
    """

    factors_out = True

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each channel of each row; for vectors one for each row."""
        keep = (0,) if batched else ()
        if ndim == len(keep) + 1:
            return Partition(keep=keep)
        return Partition(keep=(*keep, channel), shared=keep)


class PerToken(Granularity):
    """One scale for each vector that a Linear multiplies."""

    name = "token"
    factors_out = True

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each index of all dims but the last.

        Raises:
            ConfigError: The operator is a convolution.
        """
        if channel != ndim - 1:
            raise ConfigError(
                "granularity 'token' exists for Linear operators only. Add a rule for the convolutions, for example "
                "Rule('*', type='conv', activation=QuantSpec(bits=..., granularity='sample'))."
            )
        return Partition(keep=tuple(builtins.range(ndim - 1)))


class PerGroup(Granularity):
    """One scale for ``group_size`` consecutive channels; of a weight, along the input inside one group of a Conv."""

    name = "group"

    def inputs(self, ndim: int, channel: int, batched: bool) -> Partition:
        """One set for each group of channels, shared by the batch."""
        return Partition(keep=(channel,), group_dim=channel, group_size=self.group_size)

    def weight(self) -> Partition:
        """One set for each group of each output channel."""
        return Partition(keep=(0, 1), group_dim=1, group_size=self.group_size)

    def sets(self, channels: int) -> int:
        """The groups."""
        assert self.group_size is not None
        return -(-channels // self.group_size)


GRANULARITIES: dict[str, type[Granularity]] = {
    cls.name: cls for cls in (PerTensor, PerSample, PerChannel, PerSampleAndChannel, PerToken, PerGroup)
}
"""Classes by name; ``modiff.config`` holds the same names."""


def granularity_of(spec: QuantSpec) -> Granularity:
    """The granularity of a spec."""
    if spec.scales == "power_of_two":
        return PerSampleAndChannelInPowers()
    return GRANULARITIES[spec.granularity](spec.group_size)


def activation_partition(spec: QuantSpec, ndim: int, kind: str, batched: bool = True) -> Partition:
    """Partition of an operator's input.

    Args:
        spec: Its quantization.
        ndim: Number of dims of the input.
        kind: ``linear`` (channels last), else channels are in dim 1.
        batched: Whether dim 0 counts samples; without it the whole input is one sample.

    Raises:
        ConfigError: ``token`` was asked for on a convolution.
    """
    channel = ndim - 1 if kind == "linear" else int(batched)
    return granularity_of(spec).inputs(ndim, channel, batched)


def weight_partition(spec: QuantSpec) -> Partition:
    """Partition of a weight ``[out, in / groups, *kernel]``."""
    return granularity_of(spec).weight()
