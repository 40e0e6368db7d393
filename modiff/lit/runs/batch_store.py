"""Results of finished batches on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modiff.storage.atomic import write_file


class BatchStore:
    """One safetensors file for each batch, named by its first index.

    Args:
        folder: Where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, first_index: int) -> Path:
        """File of the batch that starts at ``first_index``."""
        return self.folder / f"batch_{first_index:08d}.safetensors"

    def count(self) -> int:
        """Batches that are there, of all ranks that see the folder."""
        return sum(1 for _ in self.folder.glob("batch_*.safetensors"))

    def save(self, first_index: int, tensors: dict[str, Tensor], facts: dict[str, float]) -> None:
        """Write a batch atomically."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"facts": json.dumps(facts)}
        write_file(self.path(first_index), lambda path: save_file(tensors, str(path), metadata))

    def load(self, first_index: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Read a batch; None if it is missing, or damaged and has to be drawn again."""
        path = self.path(first_index)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {})["facts"])
        except (SafetensorError, KeyError, ValueError, OSError):
            return None
