"""Noise that depends on the seed and the sample's index only (invariant 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def indexed_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """Draw standard normal noise, float32 ``[len(indices), *shape]`` on the CPU.

    A counter-based generator with the key (seed, index): PyTorch's CPU generator keeps only 32 bits of its seed, so
    there seeds and indices would collide.

    Args:
        seed: Of the run, 0 or more.
        indices: Of the samples.
        shape: Of one sample.
        stream: 0 for x_T, i + 1 for the noise of step i.

    >>> a, b = indexed_noise(0, [3, 4], (2,)), indexed_noise(0, [4], (2,))
    >>> torch.equal(a[1], b[0])
    True
    """
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in enumerate(indices):
        key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        bits = np.random.Philox(key=key, counter=counter)
        np.random.Generator(bits).standard_normal(out=out[row], dtype=np.float32)
    return torch.from_numpy(out)


def indexed_integers(seed: int, indices: Sequence[int], high: int, count: int = 1, stream: int = 0) -> Tensor:
    """Uniform whole numbers 0 .. high - 1, int64 ``[len(indices), count]``, by the generator of :func:`indexed_noise`.

    A stream must not serve noise as well: it would be the same random bits.

    >>> a, b = indexed_integers(0, [3, 4], 1000), indexed_integers(0, [4], 1000)
    >>> torch.equal(a[1], b[0])
    True
    """
    rows = np.empty((len(indices), count), dtype=np.int64)
    for row, index in enumerate(indices):
        key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        rows[row] = np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(0, high, count)
    return torch.from_numpy(rows)
