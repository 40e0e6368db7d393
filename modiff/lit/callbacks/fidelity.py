"""How close the student's images are: to the teacher's from the same noise, and to real ones."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from modiff.errors import ConfigError
from modiff.lit.student import LitStudent, to_unit_range
from modiff.metrics.features import load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.statistics import FeatureStatistics
from modiff.metrics.trajectory import psnr_db, relative_l2


class Fidelity(Callback):
    """Fréchet distances, PSNR and relative L2 error, over all ranks.

    The feature network and the statistics of real images are those of ``model.features`` and ``model.reference``, else
    the teacher's own. Without a network there is no Fréchet distance; the report says so.
    """

    def setup(self, trainer: Trainer, pl_module: LitStudent, stage: str) -> None:
        """Load the network; fails before anything is drawn."""
        entry = pl_module.spec.entry
        features = pl_module.features or entry.features
        reference = pl_module.reference or (None if pl_module.features else entry.statistics)
        self.images: ImageFidelity | None = None
        if features is not None:
            network = load_feature_network(features).to(pl_module.device)
            statistics = FeatureStatistics.load(reference) if reference is not None else None
            self.images = ImageFidelity(network, statistics).to(pl_module.device)
        elif reference is not None:
            raise ConfigError("model.reference is given, but no feature network. Give model.features as well.")
        self.psnr, self.pairs = SumMetric().to(pl_module.device), SumMetric().to(pl_module.device)
        self.l2 = MeanMetric().to(pl_module.device)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LitStudent, outputs: dict[str, Any], *_: Any) -> None:
        """Add the images of a batch, surplus ones excepted."""
        valid: Tensor = outputs["valid"]
        teacher, student = outputs["teacher"][valid], outputs["student"][valid]
        if not len(teacher):
            return
        self.l2.update(relative_l2(student, teacher).float())
        teacher, student = to_unit_range(teacher), to_unit_range(student)
        different = (teacher != student).flatten(1).any(dim=1)
        if bool(different.any()):
            self.psnr.update(psnr_db(student[different], teacher[different]).double().sum())
            self.pairs.update(different.sum().double())
        if self.images is not None:
            self.images.update(teacher, "teacher")
            self.images.update(student, "student")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Reduce over ranks."""
        results = self.images.compute() if self.images is not None else {}
        pairs = float(self.pairs.compute())
        student = {
            **results.get("student", {"fid": None, "fid_to_teacher": None}),
            "psnr_db": float(self.psnr.compute()) / pairs if pairs else None,
            "relative_l2": float(self.l2.compute()),
        }
        pl_module.results["fidelity"] = {
            "teacher": results.get("teacher", {"fid": None}),
            "student": student,
            "features": results.get("features", {"network": None, "num_features": None, "num_images": None}),
            "reasons": results.get("reasons", {"student.fid": "the teacher has no feature network; give model.features"}),
        }
