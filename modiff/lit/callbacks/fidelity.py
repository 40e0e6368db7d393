"""The metrics of an evaluation: every registered measure takes the images of every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from modiff.errors import ConfigError
from modiff.lit.data.real_images import ReferenceImages, is_statistics, network_identity
from modiff.lit.modules.student import LitStudent, to_unit_range
from modiff.lit.runs.control import current
from modiff.lit.runs.shard_features import ShardFeatures
from modiff.lit.runs.shards import ShardStore
from modiff.metrics.feature_figures import FeatureFigures
from modiff.metrics.figures import MEASURES, Findings, ImagePairs, Measure, Setting
from modiff.metrics.statistics import FeatureStatistics


class Fidelity(Callback):
    """Measures how close the student's images are to the teacher's, to real ones and to their prompts, over all ranks.

    Networks and statistics are read at once, so that a wrong path is refused before anything is written.

    Args:
        features: Path of the feature network (safetensors or TorchScript); None: no Fréchet distance, and the report
            says so.
        reference: Its statistics of real images (safetensors, npz), or the images themselves (parquet, folder), which
            are measured once; None: no distance to real images.
        image_shape: ``(C, H, W)`` of the images, on which the network is tried.
        prompted: Whether the teacher draws from prompts.
        clip: CLIP model of the CLIP score; None: the usual one, where it is on this machine.

    Raises:
        ConfigError: ``reference`` without ``features``, or of another network; ``clip`` without its extra or prompts.
        CheckpointError: A file is missing or damaged.
    """

    def __init__(
        self,
        features: str | Path | None,
        reference: str | Path | None = None,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        prompted: bool = False,
        clip: str | None = None,
    ) -> None:
        if features is None and reference is not None:
            raise ConfigError("model.reference is given, but no feature network. Give model.features as well.")
        self.real: ReferenceImages | None = None
        self.features = features
        statistics = None
        if reference is not None and is_statistics(reference):
            statistics = FeatureStatistics.load(reference)
        elif reference is not None:
            self.real = ReferenceImages(reference, image_shape)
        setting = Setting(image_shape, features, statistics, prompted, clip)
        self.measures: list[Measure] = [cls(setting) for cls in MEASURES.values()]

    @classmethod
    def of(cls, module: LitStudent) -> Fidelity:
        """Build the callback from ``model.features`` and ``model.reference``, or from the teacher's own files."""
        entry = module.spec.entry
        reference = module.reference or (None if module.features else entry.statistics)
        prompted = module.loaded.family.condition == "text"
        return cls(module.features or entry.features, reference, module.image_shape, prompted, module.clip)

    def setup(self, trainer: Trainer, pl_module: LitStudent, stage: str) -> None:
        """Move to the device; measure real images there, on rank 0 first, which fills the cache for the others."""
        for measure in self.measures:
            measure.to(pl_module.device)
        if isinstance(pl_module.store, ShardStore):
            self._measure_shards(trainer, pl_module, pl_module.store)
        if self.real is None:
            return
        for turn in (trainer.is_global_zero, not trainer.is_global_zero):
            if turn:
                self._measure_real_images(pl_module)
            trainer.strategy.barrier("reference")

    def _measure_shards(self, trainer: Trainer, module: LitStudent, store: ShardStore) -> None:
        """Let every rank measure the features of its shards; afterwards all read them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for measure in self.measures:
            if not isinstance(measure, FeatureFigures) or measure.images is None:
                continue
            assert self.features is not None
            network, identity = measure.images.network, network_identity(self.features)
            otherwise = Path(trainer.default_root_dir) / "features"
            features = ShardFeatures(store, network, identity, module.device, otherwise)
            features.measure(data.num_images, trainer.global_rank, trainer.world_size)
            current().wait("waiting for the features of the other ranks' shards")
            trainer.strategy.barrier("features")
            measure.use_outputs(features.of)

    def _measure_real_images(self, module: LitStudent) -> None:
        assert self.real is not None
        assert self.features is not None
        for measure in self.measures:
            if isinstance(measure, FeatureFigures) and measure.images is not None:
                identity = network_identity(self.features)
                measure.use_statistics(self.real.statistics(measure.images.network, identity, module.device))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LitStudent, outputs: dict[str, Any], *_: Any) -> None:
        """Give the images of a batch to every measure, except for surplus ones."""
        valid: Tensor = outputs["valid"]
        teacher, student, index = outputs["teacher"][valid], outputs["student"][valid], outputs["index"][valid]
        conditions = pl_module.conditions(index.tolist())
        pairs = ImagePairs(to_unit_range(teacher), to_unit_range(student), teacher, student, index, conditions)
        for measure in self.measures:
            measure.update(pairs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Compute every figure over all ranks."""
        found = Findings()
        for measure in self.measures:
            found |= measure.compute()
        pl_module.result.findings = found
