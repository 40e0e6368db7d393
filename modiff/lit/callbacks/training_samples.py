"""Pictures and distances while a teacher trains."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from modiff.errors import ConfigError
from modiff.lit.report.image_grids import image_grid, save_picture
from modiff.metrics.features import load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.statistics import FeatureStatistics


class TrainingSamples(Callback):
    """Draws a grid of samples at each validation, with the averaged weights.

    Args:
        folder: Where ``step_000500.png`` and its like go.
        count: Images in the grid.
    """

    def __init__(self, folder: Path, count: int = 40) -> None:
        self.folder = folder
        self.count = count

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the grid; a module without ``sample`` has none."""
        if trainer.sanity_checking or not trainer.is_global_zero or not hasattr(pl_module, "sample"):
            return
        with torch.no_grad():
            images = pl_module.sample(self.count)
        save_picture(image_grid(images, columns=10), self.folder / f"step_{trainer.global_step:06d}.png")


class TrainingDistance(Callback):
    """Logs the Fréchet distance of samples to real images at each validation, with the averaged weights.

    The figure is ``val/frechet_<feature network>``: it is not FID unless the network is Inception. The feature network
    is no part of the module, so that it is neither averaged nor written to the checkpoints.

    Args:
        features: Feature network (:func:`modiff.metrics.features.load_feature_network`).
        reference: Its statistics of real images, such as ``modiff statistics`` writes.
        count: Images drawn; at least twice as many as there are features.
        batch_size: Drawn at once.

    Raises:
        ConfigError: The reference is of another network, or there are too few images.
        CheckpointError: A file is missing or damaged.
    """

    def __init__(self, features: str | Path, reference: str | Path, count: int = 1000, batch_size: int = 250) -> None:
        with torch.random.fork_rng(devices=[]):  # a new network starts with random weights: not training's numbers
            network = load_feature_network(features)
        statistics = FeatureStatistics.load(reference)
        self.images = ImageFidelity(network, statistics, max_kept=4)  # single features are not needed
        self.name = f"val/frechet_{self.images.network_name}"
        needed = 2 * self.images.num_features
        if count < needed:
            raise ConfigError(
                f"distance_images is {count}, but {self.images.num_features} features need {needed}. Draw more images."
            )
        self.count = count
        self.batch_size = batch_size

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw images and measure their distance on rank 0."""
        if trainer.sanity_checking or not trainer.is_global_zero or not hasattr(pl_module, "sample"):
            return
        self.images.to(pl_module.device)
        self.images.reset()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for seed, first in enumerate(range(0, self.count, self.batch_size)):
                images = pl_module.sample(min(self.batch_size, self.count - first), seed=1 + seed)
                self.images.update(images.to(pl_module.device), "teacher")
        distance = self.images.compute()["teacher"]["fid"]
        if distance is None:  # samples of a training that diverged
            return
        pl_module.log(self.name, distance, prog_bar=True, rank_zero_only=True)
