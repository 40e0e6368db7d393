"""How close the student's images are: to the teacher's from the same noise, to real ones, and to their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics import SumMetric

from modiff.errors import ConfigError
from modiff.lit.callbacks.similarity import Similarity
from modiff.lit.data.real_images import ReferenceImages, is_statistics, network_identity
from modiff.lit.modules.student import LitStudent, to_unit_range
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.pairwise import psnr_db, relative_l2
from modiff.metrics.statistics import FeatureStatistics

DISTANCES = ("teacher.fid", "student.fid", "student.fid_to_teacher")
NO_FEATURES = "the teacher has no feature network; give model.features"


class Fidelity(Callback):
    """Fréchet distances, PSNR, SSIM, LPIPS, CLIP scores and relative L2 error, over all ranks.

    The network and the statistics are read at once, so that a wrong path is refused before anything is written.

    Args:
        features: Path of the feature network (safetensors or TorchScript); None: no Fréchet distance, and the report
            says so.
        reference: Its statistics of real images (safetensors, npz), or the images themselves (parquet, folder), which
            are measured once; None: no distance to real images.
        image_shape: ``(C, H, W)`` of the images, on which the network is tried.
        prompted: Whether the teacher draws from prompts.
        clip: CLIP model, as for :class:`modiff.lit.callbacks.similarity.Similarity`.

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
        self.images: ImageFidelity | None = None
        self.real: ReferenceImages | None = None
        self.features = features
        if features is not None:
            statistics = None
            if reference is not None and is_statistics(reference):
                statistics = FeatureStatistics.load(reference)
            elif reference is not None:
                self.real = ReferenceImages(reference, image_shape)
            network = load_feature_network(features)
            num_features = count_features(network, torch.zeros(2, *image_shape))
            self.images = ImageFidelity(network, statistics, num_features)
        self.similarity = Similarity(image_shape, prompted, clip)
        # Float64, so that the order of batches and ranks does not show.
        self.sums = {name: SumMetric().set_dtype(torch.float64) for name in ("psnr_db", "different", "l2", "images")}

    @classmethod
    def of(cls, module: LitStudent) -> Fidelity:
        """With the files of ``model.features`` and ``model.reference``, else the teacher's own."""
        entry = module.spec.entry
        reference = module.reference or (None if module.features else entry.statistics)
        assert module.loaded is not None
        prompted = module.loaded.family.condition == "text"
        return cls(module.features or entry.features, reference, module.image_shape, prompted, module.clip)

    def setup(self, trainer: Trainer, pl_module: LitStudent, stage: str) -> None:
        """Move to the device; measure real images there, on rank 0 first, which fills the cache for the others."""
        for metric in (self.images, *self.sums.values()):
            if metric is not None:
                metric.to(pl_module.device)
        self.similarity.to(pl_module.device)
        if self.real is None or self.images is None:
            return
        for turn in (trainer.is_global_zero, not trainer.is_global_zero):
            if turn:
                assert self.features is not None
                statistics = self.real.statistics(
                    self.images.network, network_identity(self.features), pl_module.device
                )
                statistics.check(self.images.network_name, self.images.num_features, self.images.num_spatial)
                self.images.reference = statistics
            trainer.strategy.barrier("reference")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LitStudent, outputs: dict[str, Any], *_: Any) -> None:
        """Add the images of a batch, surplus ones excepted."""
        valid: Tensor = outputs["valid"]
        teacher, student = outputs["teacher"][valid], outputs["student"][valid]
        self.sums["images"].update(len(teacher))
        self.sums["l2"].update(relative_l2(student, teacher).double().sum() if len(teacher) else 0.0)
        teacher, student = to_unit_range(teacher), to_unit_range(student)
        different = (teacher != student).flatten(1).any(dim=1)
        some = bool(different.any())
        self.sums["different"].update(different.sum())
        self.sums["psnr_db"].update(psnr_db(student[different], teacher[different]).double().sum() if some else 0.0)
        index = outputs["index"][valid]
        self.similarity.update(student, teacher, pl_module.conditions(index.tolist()))
        if not len(teacher):
            return
        if self.images is not None:
            self.images.update(teacher, "teacher", index)
            self.images.update(student, "student", index)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Reduce over ranks."""
        results = self.images.compute() if self.images is not None else {}
        sums = {name: float(metric.compute()) for name, metric in self.sums.items()}
        student = {
            **results.get("student", {"fid": None, "fid_to_teacher": None}),
            "psnr_db": sums["psnr_db"] / sums["different"] if sums["different"] else None,
            "relative_l2": sums["l2"] / sums["images"],
        }
        found = {
            "teacher": results.get("teacher", {"fid": None}),
            "student": student,
            "features": results.get("features", {"network": None, "num_features": None, "num_images": None}),
            "reasons": results.get("reasons", dict.fromkeys(DISTANCES, NO_FEATURES)),
        }
        more = self.similarity.compute()
        pl_module.results["fidelity"] = {part: {**values, **more[part]} for part, values in found.items()}
