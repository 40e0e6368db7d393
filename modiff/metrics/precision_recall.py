"""Precision and recall of images by nearest neighbours in feature space, and which features to keep for them."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.errors import ConfigError

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd: wrapping products lose nothing


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2), in float64.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour
    in the same set. Precision is the share of generated points inside the reference's manifold, recall the share
    of reference points inside the generated one.

    Args:
        reference: Features ``[R, D]``.
        generated: Features ``[G, D]``.
        k: Neighbour that sets a ball's radius.
        chunk: Rows of the distance matrix held at once; memory is ``chunk * max(R, G) * 8`` bytes.

    Raises:
        ConfigError: A set has k points or fewer.
    """
    if min(len(reference), len(generated)) <= k:
        raise ConfigError(
            f"Precision and recall with k={k} need at least {k + 1} images on each side, got {len(reference)} "
            f"and {len(generated)}. Give more images."
        )
    reference, generated = reference.double(), generated.double()
    reference_radii, generated_radii = _radii(reference, k, chunk), _radii(generated, k, chunk)
    precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, radii in zip(generated.split(chunk), generated_radii.split(chunk), strict=True):
        distances = _squared_distances(rows, reference)
        precise += int((distances <= reference_radii).any(dim=1).sum())
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return precise / len(generated), float(recalled.double().mean())


def _radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each point ``[N]`` to its k-th nearest neighbour; the point itself is the 0-th."""
    parts = [_squared_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(chunk)]
    return torch.cat(parts)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    distances = norms - 2 * a @ b.T
    # Equal points must be at distance exactly 0, or a ball of radius 0 (several equal points) would miss them.
    return distances.masked_fill(distances <= 1e-12 * norms, 0.0)


def priorities(features: Tensor, indices: Tensor | None = None) -> Tensor:
    """Pseudo-random int64 ``[N]``; the images with the smallest are kept, so batches, order and ranks do not matter.

    Args:
        features: Float32 ``[N, D]``; hashed bit by bit where no indices are given.
        indices: Sample index of each image ``[N]``: the same images are then kept at every batch size, where float
            rounding moves features by a bit.
    """
    if indices is not None:
        return _mix(indices.to(features.device, torch.int64))
    bits = features.float().contiguous().view(torch.int32).to(torch.int64)
    positions = _mix(torch.arange(features.shape[1], device=features.device)) | 1
    return _mix((_mix(bits) * positions).sum(dim=1))


def _mix(values: Tensor) -> Tensor:
    """Finalizer of SplitMix64 (Steele et al. 2014) in wrapping int64: neighbouring inputs become unrelated."""
    golden, first, second = _MULTIPLIERS
    values = (values + 1) * golden
    values = (values ^ _shift(values, 30)) * first
    values = (values ^ _shift(values, 27)) * second
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def keep_smallest(features: Tensor, priority: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The at most ``limit`` rows of smallest priority, in the order of their priority."""
    priority, order = priority.sort(stable=True)
    return features[order[:limit]], priority[:limit]
