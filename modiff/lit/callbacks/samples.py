"""Pictures of samples, and the finished batches on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from modiff.errors import ModiffError
from modiff.lit.modules.student import LitStudent, to_unit_range
from modiff.lit.report.image_grids import image_grid, save_picture, to_pixels
from modiff.lit.runs.batch_store import BatchStore
from modiff.lit.runs.shards import ShardWriter
from modiff.storage.atomic import write_file


class Samples(Callback):
    """Keeps every finished batch, draws the grid of samples, and writes single images on request.

    Args:
        folder: The run's directory; gets ``samples.png`` (teacher above student), the same as
            floats in ``samples.safetensors``, and ``images/``.
        count: Samples in the grid.
        save_images: Write every image as ``images/<who>/<index>.png``.
        shards: Writes them as shards.
    """

    def __init__(
        self, folder: Path, count: int = 24, save_images: bool = False, shards: ShardWriter | None = None
    ) -> None:
        self.folder = folder
        self.count = count
        self.save_images = save_images
        self.shards = shards

    def on_test_batch_end(self, trainer: Trainer, pl_module: LitStudent, outputs: dict[str, Any], *_: Any) -> None:
        """Store the batch; write its images."""
        kinds = [kind for kind in ("teacher", "student") if kind in outputs]
        if outputs["new"] and pl_module.store is not None:
            images = {kind: outputs[kind] for kind in kinds}
            pl_module.store.save(int(outputs["index"][0]), images, outputs["facts"])
        if self.shards is not None and pl_module.store is not None:
            self.shards.batch_done(int(outputs["index"][0]), pl_module.store)
        if self.save_images:
            for kind in kinds:
                self._write(self.folder / "images" / kind, outputs[kind], outputs["index"], outputs["valid"])

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Draw the grid, on rank 0, from the batches of all ranks."""
        trainer.strategy.barrier("samples")
        if not trainer.is_global_zero or pl_module.store is None:
            return
        if self.shards is not None:
            self.shards.finish(pl_module.store)
        module_data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count = min(self.count, module_data.num_images)
        rows = {k: to_unit_range(v) for k, v in first_images(pl_module.store, count, module_data.batch_size).items()}
        write_file(self.folder / "samples.safetensors", lambda path: save_file(rows, str(path)))
        columns = min(12, count)
        pictures = []
        for start in range(0, count, columns):
            pictures += [images[start : start + columns] for images in rows.values()]
        padded = [_pad(p, columns) for p in pictures]
        save_picture(image_grid(torch.cat(padded), columns), self.folder / "samples.png")

    on_predict_end = on_test_end

    def _write(self, folder: Path, images: Tensor, index: Tensor, valid: Tensor) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for image, i, keep in zip(to_unit_range(images).cpu(), index.tolist(), valid.tolist(), strict=True):
            if keep:
                Image.fromarray(to_pixels(image)).save(folder / f"{i:06d}.png")


def first_images(store: BatchStore, count: int, batch_size: int) -> dict[str, Tensor]:
    """Read images 0 to count - 1 of each kind from a store of finished batches; the teacher comes first.

    Raises:
        ModiffError: A batch is missing.
    """
    found: dict[str, list[Tensor]] = {}
    for first in range(0, count, batch_size):
        stored = store.load(first)
        if stored is None:
            raise ModiffError(f"{store.path(first)} is missing. Run the same command again to draw that batch.")
        for kind in sorted(stored[0], reverse=True):
            found.setdefault(kind, []).append(stored[0][kind])
    return {kind: torch.cat(batches)[:count] for kind, batches in found.items()}


def _pad(images: Tensor, columns: int) -> Tensor:
    missing = columns - len(images)
    return torch.cat([images, images.new_ones(missing, *images.shape[1:])]) if missing else images
