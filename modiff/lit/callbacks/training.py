"""Pictures while a teacher trains."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from modiff.lit.pictures import image_grid, save_picture


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
        """Draw; modules without ``sample`` draw nothing."""
        if trainer.sanity_checking or not trainer.is_global_zero or not hasattr(pl_module, "sample"):
            return
        with torch.no_grad():
            images = pl_module.sample(self.count)
        save_picture(image_grid(images, columns=10), self.folder / f"step_{trainer.global_step:06d}.png")
