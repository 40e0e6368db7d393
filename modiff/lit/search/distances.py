"""Fréchet distances of a search's images: what compares samplers that have no image in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import ConfigError
from modiff.lit.search.goals import DISTANCES, Quality
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.teacher import Teacher
from modiff.teachers.zoo import TeacherSpec


@dataclass
class Distances:
    """Fréchet distances of images to the reference images and to real ones.

    Args:
        network: Feature network (:func:`modiff.metrics.features.load_feature_network`).
        real: Statistics of real images; None: only the distance to the reference images.
        shape: ``(C, H, W)`` of an image.
    """

    network: nn.Module
    real: FeatureStatistics | None
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.features = count_features(self.network, torch.zeros(2, *self.shape))

    def __call__(self, images: Tensor, reference: Tensor) -> dict[str, float]:
        """The distances, by the names of :data:`modiff.lit.search.goals.DISTANCES`.

        Args:
            images: ``[N, C, H, W]`` in [0, 1].
            reference: The same number of reference images.
        """
        fidelity = ImageFidelity(self.network, self.real, self.features)
        with torch.no_grad():
            fidelity.update(reference, "teacher")
            fidelity.update(images, "student")
        found: dict[str, Any] = fidelity.compute()["student"]
        return {name: float(found[name]) for name in DISTANCES if found.get(name) is not None}

    def check(self, quality: Quality, images: int) -> None:
        """Refuse a quality that these images and statistics cannot give.

        Raises:
            ConfigError: There are too few images for the number of features, or no statistics of real images.
        """
        if quality.name == "fid" and self.real is None:
            raise ConfigError(
                "quality is fid, but there are no statistics of real images. Give --reference (modiff statistics "
                "writes them), or ask for fid_to_teacher."
            )
        if images <= self.features:
            raise ConfigError(
                f"quality is {quality.name} in {self.features} features, which {images} images cannot give. Give more "
                f"than {self.features} (images), and several times as many for a figure to rely on."
            )


def distances_of(
    quality: Quality, spec: TeacherSpec, teacher: Teacher, images: int, features: str | None, reference: str | None
) -> Distances | None:
    """What a search needs to judge its quality; None where no feature network takes part.

    Args:
        quality: Asked for.
        spec: The teacher's name, which may have a feature network and statistics of its own.
        teacher: Loaded.
        images: Of each setting.
        features: Feature network; None: the teacher's own.
        reference: Statistics of real images; None: the teacher's own.

    Raises:
        ConfigError: The quality is a distance, and there is no feature network, or see :meth:`Distances.check`.
    """
    if quality.name not in DISTANCES:
        return None
    features = spec.entry.features if features is None else features
    reference = spec.entry.statistics if reference is None else reference
    if features is None:
        raise ConfigError(
            f"quality is {quality.name}, but the teacher has no feature network of its own. Give --features, or ask "
            "for psnr_db or relative_l2."
        )
    real = None if reference is None else FeatureStatistics.load(reference)
    found = Distances(load_feature_network(features), real, teacher.image_shape)
    found.check(quality, images)
    return found
