"""Small feature networks and sets of images for the tests of metrics."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from modiff.metrics.features import FeatureOutputs
from modiff.metrics.fidelity import ImageFidelity

D, S, K = 6, 5, 4


class Pixels(nn.Module):
    """Features, spatial features and class scores that are pixels of a 4x4 image: random images, random features."""

    name = "pixels"
    num_features, num_spatial, num_classes = D, S, K

    def outputs(self, images: Tensor) -> FeatureOutputs:
        flat = images.flatten(1)
        return FeatureOutputs(flat[:, :D], flat[:, D : D + S], 8 * flat[:, D + S : D + S + K])


class Plain(nn.Module):
    """A network that returns features only and does not say how many, like a TorchScript file."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :6]


def images(count: int, seed: int, power: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 4, 4, generator=generator) ** power


SETS = {"reference": images(60, 0), "teacher": images(40, 1, 1.3), "student": images(40, 2, 2.0)}


def filled(metric: ImageFidelity, sets: dict[str, Tensor] = SETS, batch: int = 16) -> ImageFidelity:
    for source, pictures in sets.items():
        for part in pictures.split(batch):
            metric.update(part, source)
    return metric


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root))
