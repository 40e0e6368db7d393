"""Which elements of a tensor share a scale: the one place that reduces and expands."""

from __future__ import annotations

import builtins
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.errors import ConfigError


@dataclass(frozen=True)
class Partition:
    """A partition of a tensor's elements into sets that share a scale.

    Args:
        keep: Dims that keep scales of their own; all others are reduced.
        group_dim: Dim of which ``group_size`` consecutive entries share a scale (it is also in ``keep``).
        group_size: Size of such a group; the last one may be short.

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
        repeated = scale.repeat_interleave(self.group_size, dim=self.group_dim)
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
        missing = -x.shape[self.group_dim] % self.group_size
        if (
            missing
        ):  # the last entry again changes neither minimum nor maximum of its group, zeros do not change its sum
            last = x.narrow(self.group_dim, x.shape[self.group_dim] - 1, 1)
            last = last if repeat else torch.zeros_like(last)
            x = torch.cat([x, *[last] * missing], dim=self.group_dim)
        return x.unflatten(self.group_dim, (-1, self.group_size))

    def _join(self, reduced: Tensor) -> Tensor:
        return reduced if self.group_dim is None else reduced.squeeze(self.group_dim + 1)


def activation_partition(spec: QuantSpec, ndim: int, kind: str, batched: bool = True) -> Partition:
    """Partition of an operator's input.

    Args:
        spec: Its quantization.
        ndim: Number of dims of the input.
        kind: ``linear`` (channels last) or ``conv`` (channels in dim 1).
        batched: Whether dim 0 counts samples; without it the whole input is one sample.

    Raises:
        ConfigError: ``token`` was asked for on a convolution.
    """
    channel = ndim - 1 if kind == "linear" else int(batched)
    sample = (0,) if batched else ()
    if spec.granularity == "tensor":
        return Partition()
    if spec.granularity == "sample":
        return Partition(keep=sample)
    if spec.granularity == "channel":
        return Partition(keep=(channel,))
    if spec.granularity == "sample_channel":
        return Partition(keep=(*sample, channel))
    if spec.granularity == "group":
        return Partition(keep=(channel,), group_dim=channel, group_size=spec.group_size)
    if kind == "conv":
        raise ConfigError(
            "granularity 'token' exists for Linear operators only. Add a rule for the convolutions, for example "
            "Rule('*', type='conv', activation=QuantSpec(bits=..., granularity='sample'))."
        )
    return Partition(keep=tuple(builtins.range(ndim - 1)))


def weight_partition(spec: QuantSpec) -> Partition:
    """Partition of a weight ``[out, in / groups, *kernel]``; ``group`` runs along the input inside one conv group."""
    if spec.granularity == "tensor":
        return Partition()
    if spec.granularity == "channel":
        return Partition(keep=(0,))
    return Partition(keep=(0, 1), group_dim=1, group_size=spec.group_size)
