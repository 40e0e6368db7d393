"""How inputs, states and outputs lie in memory, and the views of them that the kernels read."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.kernels.backend import OperatorShape, Quantizer

DEPTH_MULTIPLE = 32
"""Of the channels of codes: one tensor-core instruction sums so many. Others are filled up with zeros."""
TENSOR, SAMPLE, TOKEN, SAMPLE_CHANNEL = 0, 1, 2, 3
"""Which elements share a scale, as the kernels number it."""


class Plan(NamedTuple):
    """How an input and its codes lie in memory.

    Args:
        pads: Zeros above, below, left and right.
        channels: Of the codes.
    """

    pads: tuple[int, int, int, int]
    channels: int

    @classmethod
    def of(cls, shape: OperatorShape) -> Plan:
        """That of an operator's input."""
        edges = [(0, 0)] * (2 - len(shape.padding)) + list(shape.padding)
        return cls((*edges[0], *edges[1]), padded_channels(shape.in_channels))


def padded_channels(channels: int) -> int:
    """Channels of the codes.

    >>> padded_channels(48), padded_channels(320)
    (64, 320)
    """
    return -(-channels // DEPTH_MULTIPLE) * DEPTH_MULTIPLE


def sharing(quantizer: Quantizer) -> int:
    """Which elements share a scale."""
    partition = quantizer.partition
    if partition.shared is not None:
        return SAMPLE_CHANNEL
    if quantizer.fixed is not None or not partition.keep:  # an input without a batch is one sample
        return TENSOR
    return TOKEN if quantizer.spec.granularity == "token" else SAMPLE


def tokens(a: Tensor, per: int) -> Tensor:
    """The input of a Linear as ``[samples, 1, rows, channels]``: a view where :func:`rows_merge`."""
    is_batch = a.ndim > 2 or (a.ndim == 2 and per == SAMPLE)
    return a.reshape(a.shape[0] if is_batch else 1, 1, -1, a.shape[-1])


def rows_merge(a: Tensor) -> bool:
    """Whether all dims of a tensor between the first and the last are one dim of its memory.

    >>> rows_merge(torch.zeros(2, 8, 3, 4).permute(0, 2, 3, 1)), rows_merge(torch.zeros(2, 4, 3, 8).transpose(1, 2))
    (True, False)
    """
    dims = [d for d in range(1, a.ndim - 1) if a.shape[d] > 1]
    pairs = zip(dims, dims[1:], strict=False)
    return all(a.stride(d) == a.shape[e] * a.stride(e) for d, e in pairs)


def image(a: Tensor, shape: OperatorShape) -> Tensor:
    """A view of a convolution's input or output as ``[samples, height, width, channels]``."""
    batched = a if shape.is_batched(a.ndim) else a.unsqueeze(0)
    batched = batched.unsqueeze(2) if len(shape.kernel) == 1 else batched
    return batched.permute(0, 2, 3, 1)


def from_image(found: Tensor, ndim: int, shape: OperatorShape) -> Tensor:
    """The inverse of :func:`image`, for a tensor with ``ndim`` dims."""
    found = found.permute(0, 3, 1, 2)
    found = found.squeeze(2) if len(shape.kernel) == 1 else found
    return found if shape.is_batched(ndim) else found.squeeze(0)


def is_image(found: Tensor) -> bool:
    """Whether the kernels can read it as it lies: channels last, or pixels last."""
    return found.is_contiguous() or found.permute(0, 3, 1, 2).is_contiguous()


def is_dense(a: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order."""
    return torch.empty_like(a, device="meta").stride() == a.stride()


def in_memory_order(a: Tensor, per: int) -> Tensor:
    """A dense tensor as ``[samples, 1, rows, channels]``, where only samples have a meaning."""
    flat = a.permute(sorted(range(a.ndim), key=lambda d: (-a.stride()[d], d)))
    samples = a.shape[0] if per == SAMPLE and a.ndim > 1 else 1
    size = a.numel() // max(samples, 1)
    return flat.reshape(samples, 1, -1, math.gcd(size, 128))


def by_channel(a: Tensor, channel: int) -> Tensor | None:
    """A tensor as ``[samples, 1, rows, channels]`` with its own channels; None where that is no view of it.

    A tensor whose first dim is that of its channels is one sample.
    """
    moved = a.movedim(channel, -1)
    moved = moved if channel > 0 else moved.unsqueeze(0)
    if not rows_merge(moved):
        return None
    found = moved.reshape(moved.shape[0], 1, -1, moved.shape[-1])
    return found if is_image(found) else None


def scale_shape(scale: Tensor, a: Tensor, per: int) -> list[int]:
    """The shape in which a scale broadcasts against the input."""
    if per == TOKEN:
        return [*a.shape[:-1], 1]
    return [scale.numel(), *[1] * (a.ndim - 1)]
