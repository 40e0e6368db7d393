"""Figures of one feature network: Fréchet distances, inception score, precision and recall."""

from __future__ import annotations

from collections.abc import Callable

import torch

from modiff.metrics.feature_outputs import FeatureOutputs
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.registry import Figure, Findings, ImagePairs, Measure, Setting, measure
from modiff.metrics.statistics import FeatureStatistics

BOTH = ("teacher", "student")
NO_FEATURES = "the teacher has no feature network; give model.features"
DISTANCES = ("teacher.fid", "student.fid", "student.fid_to_teacher")


def _figures() -> tuple[Figure, ...]:
    network = {"network": "network", "reason": NO_FEATURES}
    real, teacher = "to real images", "to the teacher's images"
    return (
        Figure(
            "fid_to_teacher",
            f"Fréchet distance {teacher}",
            better="lower",
            column="Fréchet\nto\nteacher",
            order=20,
            **network,
        ),
        Figure(
            "fid", f"Fréchet distance {real}", better="lower", of=BOTH, column="Fréchet\nto\nreal", order=30, **network
        ),
        Figure("sfid_to_teacher", f"Spatial Fréchet distance {teacher}", better="lower", order=60, **network),
        Figure("sfid", f"Spatial Fréchet distance {real}", better="lower", of=BOTH, order=61, **network),
        Figure("inception_score", "Inception score", better="higher", of=BOTH, order=62, **network),
        Figure("precision_to_teacher", "Precision against the teacher's images", better="higher", order=63, **network),
        Figure("recall_to_teacher", "Recall of the teacher's images", better="higher", order=64, **network),
        Figure("precision", "Precision against real images", better="higher", of=BOTH, order=65, **network),
        Figure("recall", "Recall of real images", better="higher", of=BOTH, order=66, **network),
    )


@measure
class FeatureFigures(Measure):
    """What teacher and student look like to the feature network of the recipe; see :class:`ImageFidelity`.

    Raises:
        ConfigError: The statistics are of another network.
        CheckpointError: A file is missing or damaged.
    """

    figures = _figures()

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.images: ImageFidelity | None = None
        self.known: Callable[[str, list[int]], FeatureOutputs] | None = None
        if setting.features is not None:
            network = load_feature_network(setting.features)
            num_features = count_features(network, torch.zeros(2, *setting.image_shape))
            self.images = ImageFidelity(network, setting.statistics, num_features)

    def use_outputs(self, known: Callable[[str, list[int]], FeatureOutputs]) -> None:
        """Take the network's outputs for images of ``teacher`` or ``student`` from where they are known."""
        self.known = known

    def use_statistics(self, statistics: FeatureStatistics) -> None:
        """Compare with these real images, which were measured after the network had been built.

        Raises:
            ConfigError: They are of another network.
        """
        assert self.images is not None
        statistics.check(self.images.network_name, self.images.num_features, self.images.num_spatial)
        self.images.reference = statistics

    def update(self, images: ImagePairs) -> None:
        """Pass both sides' images through the network."""
        if self.images is None or not len(images):
            return
        for who, pictures in (("teacher", images.teacher), ("student", images.student)):
            outputs = None if self.known is None else self.known(who, images.index.tolist())
            self.images.update(pictures, who, images.index, outputs)

    def compute(self) -> Findings:
        """All figures of the network, or the three Fréchet distances as None where there is no network."""
        if self.images is None:
            features = dict.fromkeys(("network", "num_features", "num_images"))
            return Findings(dict.fromkeys(DISTANCES), dict.fromkeys(DISTANCES, NO_FEATURES), features)
        found = self.images.compute()
        values = {f"{who}.{name}": number for who in BOTH for name, number in found[who].items()}
        return Findings(values, found["reasons"], found["features"])
