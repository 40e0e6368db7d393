"""The data module of an evaluation: which samples a rank draws, in which batches."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from modiff.config.checks import shown
from modiff.errors import ConfigError

MOST = 10_000_000
"""Images of a run, and of a batch: more would not end, and their indices alone fill the memory."""


class NoiseDataModule(LightningDataModule):
    """Indices of the samples to draw; the noise itself comes from the seed and the index.

    Whole batches of consecutive indices are dealt to the ranks in turn, and the last one is filled up with indices that
    are drawn and thrown away. So every image is drawn in a batch of the same indices, whatever the number of devices
    and of images (invariant 3).

    Args:
        batch_size: Samples per batch and rank.
        num_images: Samples to keep.

    Raises:
        ConfigError: A number is below 1.
    """

    def __init__(self, batch_size: int = 64, num_images: int | None = 128) -> None:
        super().__init__()
        num_images = 128 if num_images is None else num_images
        for name, value in (("data.batch_size", batch_size), ("num_images", num_images)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; allowed are whole numbers, 1 or more.")
            if value > MOST:
                raise ConfigError(f"{name} is {shown(value)}; allowed are whole numbers, 1 to {MOST}.")
        self.batch_size = batch_size
        self.num_images = num_images

    def test_dataloader(self) -> DataLoader:
        """Batches ``{"index": int64 [B], "valid": bool [B]}`` of this rank."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DataLoader(self.batches(world, rank), batch_size=None, collate_fn=None)

    predict_dataloader = test_dataloader

    def batches(self, world_size: int = 1, rank: int = 0) -> list[dict[str, Tensor]]:
        """The batches of one rank; every rank gets equally many."""
        rounds = -(-self.num_images // (self.batch_size * world_size))
        firsts = range(rank * self.batch_size, rounds * world_size * self.batch_size, world_size * self.batch_size)
        indices = [torch.arange(first, first + self.batch_size) for first in firsts]
        return [{"index": index, "valid": index < self.num_images} for index in indices]
