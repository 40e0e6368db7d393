"""Features of images in shards: measured once for each shard and network, and kept beside it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modiff.lit.runs.control import current
from modiff.lit.runs.shards import KINDS, ShardStore
from modiff.metrics.feature_outputs import FeatureOutputs
from modiff.metrics.features import extract, network_name
from modiff.storage.atomic import write_file
from modiff.storage.hashing import hash_file

PARTS = ("features", "spatial", "logits")


class ShardFeatures:
    """What a feature network gives for the images of shards.

    A file ``shard-000000.<network>.safetensors`` for each shard holds the outputs for every image of teacher and
    student, from which the figures' statistics are added up; it is written as soon as its shard is measured, so that a
    run that was stopped goes on with the next one. It names the content of the shard, the network and the batch size:
    where one of them is another one, the shard is measured again.

    Args:
        store: The shards.
        network: Feature network, on ``device``.
        identity: Content hash of the network.
        device: Where the images are measured.
        otherwise: Folder for the files where that of the shards cannot be written.
    """

    def __init__(
        self, store: ShardStore, network: nn.Module, identity: str, device: torch.device, otherwise: Path
    ) -> None:
        self.store, self.network, self.device = store, network, device
        self.folder = store.folder if os.access(store.folder, os.W_OK) else otherwise
        self.name = f"{network_name(network)}-{identity[:12]}"
        self.key = {"network": identity, "batch_size": str(store.batch_size)}
        self._last: tuple[int, dict[str, Tensor]] | None = None

    def path(self, number: int) -> Path:
        """File of a shard's features."""
        return self.folder / f"{self.store.shard_path(number).stem}.{self.name}.safetensors"

    def measure(self, num_images: int, rank: int = 0, world_size: int = 1) -> int:
        """Measure this rank's share of the shards that hold the first ``num_images`` images.

        Returns:
            How many were not measured before.
        """
        measured = 0
        for number in range(rank, -(-num_images // self.store.size), world_size):
            key = {**self.key, "shard": hash_file(self.store.shard_path(number))}
            if self._key_of(self.path(number)) != key:
                outputs = self._outputs(number)
                write_file(self.path(number), lambda path, of=outputs, key=key: save_file(of, str(path), key))
                measured += 1
        return measured

    def of(self, who: str, indices: list[int]) -> FeatureOutputs:
        """The outputs for images of ``teacher`` or ``student``; :meth:`measure` has been there before, on all ranks."""
        rows: dict[str, list[Tensor]] = {}
        for index in indices:
            shard = self._shard(index // self.store.size)
            for part in PARTS:
                if f"{who}.{part}" in shard:
                    rows.setdefault(part, []).append(shard[f"{who}.{part}"][index % self.store.size])
        stacked = {part: torch.stack(found).to(self.device) for part, found in rows.items()}
        return FeatureOutputs(stacked["features"], stacked.get("spatial"), stacked.get("logits"))

    def _outputs(self, number: int) -> dict[str, Tensor]:
        first, size = number * self.store.size, self.store.batch_size
        last = min(first + self.store.size, self.store.num_images)
        found: dict[str, list[Tensor]] = {}
        for start in range(first, last, size):
            current().step(f"features of {self.store.shard_path(number).name}, images {start} to {start + size - 1}")
            images = self.store.images(start, min(start + size, last))
            for who in KINDS:
                outputs = extract(self.network, (images[who] / 2 + 0.5).clamp(0, 1).to(self.device))
                for part in PARTS:
                    values = getattr(outputs, part)
                    if values is not None:
                        found.setdefault(f"{who}.{part}", []).append(values.cpu())
        return {name: torch.cat(parts).contiguous() for name, parts in found.items()}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if self._last is None or self._last[0] != number:
            with safe_open(str(self.path(number)), framework="pt") as file:
                self._last = number, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return self._last[1]

    @staticmethod
    def _key_of(path: Path) -> dict[str, str] | None:
        try:
            with safe_open(str(path), framework="pt") as file:
                return dict(file.metadata() or {})
        except (OSError, SafetensorError):
            return None
