"""Batches cut from images held as bytes: no worker, and an order that a checkpoint goes on with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modiff.errors import ConfigError


class ImageDataset(Dataset):
    """Images held in memory as bytes.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        flips: Mirror each image left to right with probability 1/2.
    """

    def __init__(self, images: Tensor, labels: Tensor, flips: bool = False) -> None:
        self.images = images
        self.labels = labels
        self.flips = flips

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """One batch: ``image`` float ``[B, C, H, W]`` in [0, 1], ``label`` int64 ``[B]``."""
        index = torch.as_tensor(indices)
        images = self.images[index]
        if self.flips:
            images = flip(images, torch.rand(len(images)) < 0.5)
        return {"image": images.float().div_(255), "label": self.labels[index]}


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right.

    Args:
        images: ``[B, C, H, W]``, any dtype.
        chosen: bool ``[B]``.

    >>> flip(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten().tolist()
    [2, 1, 3, 4]
    """
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


class DeviceBatches:
    """Shuffled training batches, or test batches in order, of a data set held as bytes on one device.

    Order and flips of an epoch depend on the seed and on the epoch only, and the place in it is part of every
    checkpoint: a resumed training sees the images that the uninterrupted one would have seen. The global random
    numbers are not touched.

    Args:
        dataset: The images; they are moved to ``device`` at once, as uint8.
        batch_size: Images per batch and rank.
        device: Where batches are wanted.
        shuffle: Training: another order each epoch, an incomplete last batch is dropped, ``dataset.flips`` applies.
        seed: Of order and flips.
        world_size: Ranks, which share each epoch's order.
        rank: Which of them.

    Raises:
        ConfigError: There are fewer images than one training batch needs.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        device: torch.device | str,
        shuffle: bool,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.dataset = ImageDataset(dataset.images.to(device), dataset.labels.to(device), dataset.flips)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.epoch = 0
        self.position = 0
        if shuffle and len(self) == 0:
            raise ConfigError(
                f"data.batch_size is {batch_size} on {world_size} device(s), but there are {len(dataset)} training "
                "images. Make it smaller."
            )

    def __len__(self) -> int:
        mine = len(self.dataset) // self.world_size
        return mine // self.batch_size if self.shuffle else -(-mine // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches from where a checkpoint left off.

        Each is ``{"image": float [B, C, H, W] in [0, 1], "label": int64 [B], "number": int64 [B]}``. The number counts
        the images seen since the first epoch began; it is the same on any number of ranks, so that noise can be drawn
        for it.
        """
        if not self.shuffle or self.position >= len(self):
            self.epoch += int(self.shuffle)
            self.position = 0
        index, flips = (t.to(self.device) for t in self._plan())
        for number in range(self.position, len(self)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            images = self.dataset.images[index[part]]
            if self.shuffle and self.dataset.flips:
                images = flip(images, flips[part])
            self.position = number + 1
            places = self.rank + self.world_size * torch.arange(part.start, part.start + len(images))
            numbers = places + self.epoch * len(self.dataset)
            yield {"image": images.float().div_(255), "label": self.dataset.labels[index[part]], "number": numbers}

    def _plan(self) -> tuple[Tensor, Tensor]:
        """Order of this epoch's images on this rank, and which of them are mirrored."""
        count = len(self.dataset)
        if not self.shuffle:
            return torch.arange(count)[self.rank :: self.world_size], torch.zeros(count, dtype=torch.bool)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(count, generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        return order[self.rank :: self.world_size], flips[self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and place in it; Lightning writes them to its checkpoints."""
        batch = self.batch_size * self.world_size
        return {"epoch": self.epoch, "position": self.position, "images": len(self.dataset), "batch": batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there; with other data or another batch (of all ranks together), at the start of that epoch."""
        same = (state["images"], state["batch"]) == (len(self.dataset), self.batch_size * self.world_size)
        self.epoch, self.position = state["epoch"], state["position"] if same else 0
