"""FID, sFID, inception score, precision and recall of teacher and student in one pass of one feature network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from modiff.errors import ConfigError
from modiff.metrics.feature_outputs import FeatureOutputs
from modiff.metrics.features import count_features, extract, network_name
from modiff.metrics.precision_recall import keep_smallest, precision_recall, priorities
from modiff.metrics.statistics import FeatureStatistics, frechet_distance
from modiff.metrics.sums import add, empty, merge, value

__all__ = ["MAX_KEPT", "SOURCES", "FeatureStatistics", "ImageFidelity", "frechet_distance"]

SOURCES = ("teacher", "student", "reference")
NEIGHBOURS = 3
MAX_KEPT = 10_000


class ImageFidelity(Metric):
    """What a teacher's and a student's images look like to a feature network.

    Every batch passes the network once. Sums are kept with twice the digits of float64, so that the same batches give
    the same figures in any order and on any number of ranks, bit for bit; other batches, up to float64 rounding.
    Features themselves are kept for precision and recall only, ``max_kept`` per source: of more images a pseudo-random
    subset, the same one whatever the order. That is ``3 * max_kept * D * 4`` bytes at most.

    The inception score (Salimans et al. 2016) is over all images at once. Published ones are means over ten random
    splits, which lie a little lower and depend on the splits; torchmetrics' own keeps every score and draws the
    splits from the global generator, so its arithmetic is not used here.

    Args:
        network: Feature network (:func:`modiff.metrics.features.load_feature_network`).
        reference: Statistics of real images; without them, give real images to :meth:`update`, or have no ``fid``.
            They give precision and recall too where they hold features.
        num_features: D, for a network that does not say (TorchScript); else taken from the reference.
        max_kept: Features kept per source for precision and recall.

    Raises:
        ConfigError: The reference is of another network or dimension, or D is unknown.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(
        self,
        network: nn.Module,
        reference: FeatureStatistics | None = None,
        num_features: int | None = None,
        max_kept: int = MAX_KEPT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network = network.eval()
        self.network_name = network_name(network)
        if num_features is None and reference is not None and getattr(network, "num_features", None) is None:
            num_features = reference.num_features
        self.num_features = count_features(network) if num_features is None else num_features
        self.num_spatial: int | None = getattr(network, "num_spatial", None)
        self.num_classes: int | None = getattr(network, "num_classes", None)
        if max_kept <= NEIGHBOURS:
            raise ConfigError(f"max_kept must be at least {NEIGHBOURS + 1}, got {max_kept}.")
        self.max_kept = max_kept
        self.reference = reference
        if reference is not None:
            reference.check(self.network_name, self.num_features, self.num_spatial)
        for source in SOURCES:
            self._add_states(source)

    def _add_states(self, source: str) -> None:
        self.add_state(f"{source}_count", torch.tensor(0), dist_reduce_fx="sum")
        for prefix, size in (("", self.num_features), ("spatial_", self.num_spatial)):
            if size is not None:
                self.add_state(f"{source}_{prefix}sum", empty(size), dist_reduce_fx=merge)
                self.add_state(f"{source}_{prefix}outer", empty(size, size), dist_reduce_fx=merge)
        if self.num_classes is not None:
            self.add_state(f"{source}_probability", empty(self.num_classes), dist_reduce_fx=merge)
            self.add_state(f"{source}_negentropy", empty(), dist_reduce_fx=merge)
        self.add_state(f"{source}_kept", [], dist_reduce_fx="cat")
        self.add_state(f"{source}_priority", [], dist_reduce_fx="cat")

    def train(self, mode: bool = True) -> ImageFidelity:
        """Stay in evaluation mode: batch statistics of the network must not move."""
        return super().train(False)

    def update(
        self, images: Tensor, source: str, indices: Tensor | None = None, outputs: FeatureOutputs | None = None
    ) -> None:
        """Take a batch of images.

        Args:
            images: Float ``[N, C, H, W]`` in [0, 1], on the metric's device.
            source: ``"teacher"``, ``"student"`` or ``"reference"`` (real images, instead of statistics).
            indices: Sample indices ``[N]``; they only decide which features are kept when there are more than
                ``max_kept``.
            outputs: What the network gives for them, where that is known; None: the images pass the network here.

        Raises:
            ConfigError: Unknown source, images of another kind, or a network that returns another dimension.
        """
        self._check(images, source)
        outputs = extract(self.network, images) if outputs is None else outputs
        self._add(f"{source}_", self._of_width("features", outputs.features, self.num_features))
        setattr(self, f"{source}_count", getattr(self, f"{source}_count") + len(images))
        if self.num_spatial is not None:
            self._add(f"{source}_spatial_", self._of_width("spatial features", outputs.spatial, self.num_spatial))
        if self.num_classes is not None:
            logits = self._of_width("class scores", outputs.logits, self.num_classes)
            probability = logits.double().softmax(dim=1)
            self._increase(f"{source}_probability", probability.sum(dim=0))
            # Each image first: the sum of a whole large tensor depends on the number of threads.
            self._increase(f"{source}_negentropy", torch.special.xlogy(probability, probability).sum(dim=1).sum())
        features = outputs.features.float()
        getattr(self, f"{source}_kept").append(features)
        getattr(self, f"{source}_priority").append(priorities(features, indices))
        if sum(len(part) for part in getattr(self, f"{source}_priority")) > 2 * self.max_kept:
            kept, priority = self._kept(source)
            setattr(self, f"{source}_kept", [kept])
            setattr(self, f"{source}_priority", [priority])

    def _check(self, images: Tensor, source: str) -> None:
        if source not in SOURCES:
            raise ConfigError(f"Images are of one of {', '.join(SOURCES)}; got {source!r}.")
        if source == "reference" and self.reference is not None:
            raise ConfigError("Reference statistics were given already. Give either statistics or reference images.")
        if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
            raise ConfigError(
                f"Images must be float [N, C, H, W] in [0, 1]; got {images.dtype} {list(images.shape)}. "
                "Divide 8-bit images by 255."
            )
        low, high = (float(bound) for bound in images.aminmax())
        if low < 0 or high > 1:
            raise ConfigError(f"Images must lie in [0, 1]; got [{low:.3g}, {high:.3g}]. Rescale and clamp them.")

    def _of_width(self, what: str, values: Tensor | None, width: int) -> Tensor:
        if values is None or values.ndim != 2 or values.shape[1] != width:
            got = "none" if values is None else list(values.shape)
            raise ConfigError(
                f"Feature network {self.network_name!r} should return {width} {what} per image; got {got}. Give the "
                "num_features of this network, and a reference that was made with it."
            )
        return values

    def _add(self, prefix: str, values: Tensor) -> None:
        values = values.double()
        self._increase(f"{prefix}sum", values.sum(dim=0))
        self._increase(f"{prefix}outer", values.T @ values)

    def _increase(self, state: str, amount: Tensor) -> None:
        setattr(self, state, add(getattr(self, state), amount))

    def _kept(self, source: str) -> tuple[Tensor, Tensor]:
        return keep_smallest(
            dim_zero_cat(getattr(self, f"{source}_kept")),
            dim_zero_cat(getattr(self, f"{source}_priority")),
            self.max_kept,
        )

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks; a rank without images joins in with empty ones."""
        for source in SOURCES:
            if len(getattr(self, f"{source}_kept")) == 0:
                setattr(self, f"{source}_kept", [torch.empty(0, self.num_features, device=self.device)])
                setattr(self, f"{source}_priority", [torch.empty(0, dtype=torch.int64, device=self.device)])
        super().sync(*args, **kwargs)

    def statistics(self, source: str, with_features: bool = False) -> FeatureStatistics:
        """Statistics of one source's images, to save or to use as a reference; of this rank only.

        Args:
            source: Whose.
            with_features: Take the at most ``max_kept`` features along, so that precision and recall can be measured.

        Raises:
            ConfigError: There are fewer than two images, or the features are not finite.
        """
        count = int(getattr(self, f"{source}_count"))
        if count < 2:
            raise ConfigError(f"A covariance needs at least 2 images, got {count} of the {source}. Give more images.")
        mean, covariance = self._moments(f"{source}_", count)
        spatial = (None, None) if self.num_spatial is None else self._moments(f"{source}_spatial_", count)
        features = self._kept(source)[0] if with_features else None
        return FeatureStatistics(mean, covariance, count, self.network_name, *spatial, features)

    def _moments(self, prefix: str, count: int) -> tuple[Tensor, Tensor]:
        mean = value(getattr(self, f"{prefix}sum")) / count
        return mean, (value(getattr(self, f"{prefix}outer")) - count * torch.outer(mean, mean)) / (count - 1)

    def compute(self) -> dict[str, Any]:
        """All figures, None where one cannot be given; ``reasons`` then says why.

        Returns:
            ``teacher`` and ``student`` with ``fid``, ``sfid``, ``inception_score``, ``precision`` and ``recall``
            against the real images; ``student`` also ``fid_to_teacher``, ``sfid_to_teacher``,
            ``precision_to_teacher`` and ``recall_to_teacher``; ``features`` with ``network``, ``num_features``,
            ``num_images`` (the smaller count where teacher and student differ) and ``num_reference_images``;
            ``reasons`` from dotted key to sentence.
        """
        return _Report(self).build()


class _Report:
    """One result under construction: every figure is a value or a reason."""

    def __init__(self, metric: ImageFidelity) -> None:
        self.metric = metric
        self.counts = {source: int(getattr(metric, f"{source}_count")) for source in SOURCES}
        self.finite = {s: bool(getattr(metric, f"{s}_sum").isfinite().all()) for s in SOURCES}
        self.statistics = {
            s: metric.statistics(s) if self.counts[s] > 1 and self._spatial_finite(s) else None for s in SOURCES
        }
        self.reasons: dict[str, str] = {}

    def _spatial_finite(self, source: str) -> bool:
        if self.metric.num_spatial is not None:
            self.finite[source] &= bool(getattr(self.metric, f"{source}_spatial_sum").isfinite().all())
        return self.finite[source]

    def build(self) -> dict[str, Any]:
        metric, given = self.metric, self.metric.reference
        drawn = [self.counts[s] for s in ("teacher", "student") if self.counts[s]]
        result: dict[str, Any] = {s: self._source(s) for s in ("teacher", "student")}
        result["features"] = {
            "network": metric.network_name,
            "num_features": metric.num_features,
            "num_images": min(drawn, default=0),
            "num_reference_images": given.num_images if given is not None else self.counts["reference"] or None,
        }
        return {**result, "reasons": self.reasons}

    def _source(self, source: str) -> dict[str, float | None]:
        real = self.metric.reference or self.statistics["reference"]
        row = {
            "fid": self._frechet(f"{source}.fid", source, real, "reference"),
            "sfid": self._frechet(f"{source}.sfid", source, real, "reference"),
            "inception_score": self._inception_score(source),
            **self._neighbours(source, "reference", ""),
        }
        if source == "student":
            teacher = self.statistics["teacher"]
            row["fid_to_teacher"] = self._frechet("student.fid_to_teacher", source, teacher, "teacher")
            row["sfid_to_teacher"] = self._frechet("student.sfid_to_teacher", source, teacher, "teacher")
            row.update(self._neighbours(source, "teacher", "_to_teacher"))
        return row

    def _problem(self, source: str, against: str, needed: int, size: int | None = None) -> str | None:
        """Why these two sets of images cannot be compared, or None; ``size`` features need ``2 * size`` images."""
        for name in (source, against):
            if name == "reference" and self.metric.reference is not None:
                continue
            if self.counts[name] == 0:
                return f"no {name} images" + (" or statistics were given" if name == "reference" else " were drawn")
            if not self.finite[name]:
                return f"the features of the {name} images hold NaN or Inf"
            if self.counts[name] < needed:
                verb = "were given" if name == "reference" else "were drawn"
                why = f" (twice the {size} features of {self.metric.network_name})" if size else ""
                return f"{needed} {name} images are needed, {self.counts[name]} {verb}{why}"
        return None

    def _frechet(self, key: str, source: str, other: FeatureStatistics | None, against: str) -> float | None:
        spatial = ".sfid" in key
        size = self.metric.num_spatial if spatial else self.metric.num_features
        if size is None:
            return self._none(key, f"feature network {self.metric.network_name!r} has no spatial features")
        problem = self._problem(source, against, 2 * size, size)
        mine = self.statistics[source]
        if problem is not None or mine is None or other is None:
            return self._none(key, problem or "two images are needed")
        if not spatial:
            return frechet_distance(mine, other)
        if mine.spatial is None or other.spatial is None:
            return self._none(key, "the reference statistics hold no spatial features")
        return frechet_distance(mine.spatial, other.spatial)

    def _inception_score(self, source: str) -> float | None:
        key = f"{source}.inception_score"
        if self.metric.num_classes is None:
            return self._none(key, f"feature network {self.metric.network_name!r} has no class scores")
        problem = self._problem(source, source, 2)
        if problem is not None:
            return self._none(key, problem)
        mean = value(getattr(self.metric, f"{source}_probability")) / self.counts[source]
        conditional = value(getattr(self.metric, f"{source}_negentropy")) / self.counts[source]
        return float((conditional - torch.special.xlogy(mean, mean).sum()).exp())

    def _neighbours(self, source: str, against: str, suffix: str) -> dict[str, float | None]:
        keys = [f"precision{suffix}", f"recall{suffix}"]
        problem = self._problem(source, against, NEIGHBOURS + 1)
        given = self.metric.reference if against == "reference" else None
        if problem is None and given is not None:
            problem = self._problem_of_features(given)
        if problem is not None:
            return {key: self._none(f"{source}.{key}", problem) for key in keys}
        generated = self.metric._kept(source)[0]
        real = self.metric._kept(against)[0] if given is None or given.features is None else given.features
        figures = precision_recall(real.to(generated.device), generated, NEIGHBOURS)
        return dict(zip(keys, figures, strict=True))

    @staticmethod
    def _problem_of_features(given: FeatureStatistics) -> str | None:
        if given.features is None:
            return "precision and recall need the reference images; these statistics hold none of their features"
        if len(given.features) <= NEIGHBOURS:
            return f"{NEIGHBOURS + 1} reference images are needed, {len(given.features)} were given"
        return None

    def _none(self, key: str, reason: str) -> float | None:
        self.reasons[key] = reason
        return None
