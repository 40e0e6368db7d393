"""Operators that read one vector per sample: embeddings of time, size, class or pooled text, and their projections."""

from __future__ import annotations

from torch import Tensor

VECTOR = 4096
"""Most channels of such a vector: 16 KiB in float32."""


def is_vector(x: Tensor, kind: str, batched: bool) -> bool:
    """Whether each sample of an operator's input is one vector: ``[B, C]``, ``[B, 1, C]``, or ``[B, C, 1, 1]``.

    Such an input takes few bytes and few products, and an error in it is the same at every place of an image, so that
    it adds up in the mean where those of pixels cancel out (benchmarks/state.md, benchmarks/bits.md).

    Args:
        x: The input.
        kind: ``linear`` (channels in the last dim), else channels are in dim 1.
        batched: Whether dim 0 counts samples.

    >>> import torch
    >>> is_vector(torch.zeros(2, 8), "linear", True), is_vector(torch.zeros(2, 8, 4, 4), "conv", True)
    (True, False)
    """
    if not batched or x.ndim < 2:
        return False
    places, channels = (x.shape[1:-1], x.shape[-1]) if kind == "linear" else (x.shape[2:], x.shape[1])
    return places.numel() == 1 and channels <= VECTOR
