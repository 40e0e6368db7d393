"""Images of large evaluations as shards: tar files in WebDataset's layout, or npz; written beside the sampling."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.report.image_grids import to_pixels
from modiff.lit.runs.batch_store import BatchStore
from modiff.storage.atomic import write_file, write_json

ShardKind = Literal["tar", "npz"]
MANIFEST = "shards.json"
KINDS = ("teacher", "student")


class ShardWriter:
    """Writes a shard as soon as all of its batches are there, whichever rank drew them.

    A shard depends on its images only, to the byte, so that two ranks that finish it at once write the same. In a tar
    file image ``i`` is ``{i:08d}.teacher.png``, ``{i:08d}.student.png`` and ``{i:08d}.json``; in an npz file ``arr_0``
    holds the student's images (uint8 ``[N, H, W, C]``, what evaluators of 50,000 images read), ``teacher`` the
    teacher's, ``index`` their numbers.

    Args:
        folder: Gets ``shard-000000.tar`` and so on, and ``shards.json``.
        kind: ``tar`` or ``npz``.
        shard_images: Images in a shard; rounded down to whole batches.
        batch_size: Of the run.
        num_images: Of the run.
    """

    def __init__(self, folder: Path, kind: ShardKind, shard_images: int, batch_size: int, num_images: int) -> None:
        self.folder, self.kind, self.batch_size, self.num_images = folder, kind, batch_size, num_images
        self.shard_images = max(1, shard_images // batch_size) * batch_size

    def path(self, first: int) -> Path:
        """File of the shard that holds image ``first``."""
        return self.folder / f"shard-{first // self.shard_images:06d}.{self.kind}"

    def finish(self, store: BatchStore) -> None:
        """Write every shard that is still missing: a rank may not have seen another's last batch at once."""
        for first in range(0, self.num_images, self.shard_images):
            self.batch_done(first, store)

    def batch_done(self, first: int, store: BatchStore) -> None:
        """Write the shard of the batch that starts at ``first``, where that was its last missing one."""
        start = first // self.shard_images * self.shard_images
        stop = min(start + self.shard_images, self.num_images)
        target = self.path(start)
        firsts = range(start, stop, self.batch_size)
        if start >= self.num_images or target.exists() or not all(store.path(i).is_file() for i in firsts):
            return
        batches = [store.load(i) for i in firsts]
        if any(batch is None for batch in batches):
            return  # damaged; it is drawn again
        tensors = [batch[0] for batch in batches if batch is not None]
        pixels = {
            kind: torch.cat([part[kind] for part in tensors])[: stop - start] for kind in KINDS if kind in tensors[0]
        }
        images = {kind: [to_pixels(image) for image in (x / 2 + 0.5).clamp(0, 1)] for kind, x in pixels.items()}
        write = _write_tar if self.kind == "tar" else _write_npz
        write_file(target, lambda path: write(path, start, images))
        shape = list(next(iter(pixels.values())).shape[1:])
        facts = {key: batches[0][1].get(key) for key in ("evaluations", "quantized")} if batches[0] else {}
        manifest = {"kind": self.kind, "num_images": self.num_images, "shard_images": self.shard_images}
        write_json(self.folder / MANIFEST, {**manifest, "shape": shape, "of": list(images), **facts})


def _write_tar(path: Path, start: int, images: dict[str, list[np.ndarray]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for offset in range(len(next(iter(images.values())))):
            name = f"{start + offset:08d}"
            for kind, pixels in images.items():
                file = io.BytesIO()
                Image.fromarray(pixels[offset]).save(file, "png")
                _add(tar, f"{name}.{kind}.png", file.getvalue())
            _add(tar, f"{name}.json", json.dumps({"index": start + offset}).encode())


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # no time, no owner: equal images make equal bytes
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _write_npz(path: Path, start: int, images: dict[str, list[np.ndarray]]) -> None:
    arrays = {kind: np.stack([_channels_last(pixels) for pixels in found]) for kind, found in images.items()}
    count = len(next(iter(arrays.values())))
    student = arrays.pop("student")
    with open(path, "wb") as file:
        np.savez(file, arr_0=student, index=np.arange(start, start + count), **arrays)  # type: ignore[arg-type]


def _channels_last(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., None] if pixels.ndim == 2 else pixels


class ShardStore(BatchStore):
    """Shards under the interface of a run's batches: metrics read them where others draw. Images have 8 bits.

    Args:
        folder: Of :class:`ShardWriter`.
        batch_size: Images of a batch.

    Raises:
        CheckpointError: The folder holds no shards, or they are damaged.
    """

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__(folder)
        self.batch_size = batch_size
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            self.num_images, self.size = int(self.manifest["num_images"]), int(self.manifest["shard_images"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"--from_images {folder} holds no {MANIFEST}. Give the folder `shards` of a run with --shards tar."
            ) from error
        self._last: tuple[int, dict[str, Tensor]] | None = None

    def check(self, num_images: int, shape: tuple[int, ...]) -> None:
        """Refuse shards that do not hold what is asked for.

        Raises:
            ConfigError: There are too few images, of another shape, or of the student alone.
        """
        found = tuple(self.manifest["shape"])
        if found != tuple(shape):
            raise ConfigError(
                f"--from_images {self.folder} holds images {list(found)}; the teacher draws {list(shape)}."
            )
        if num_images > self.num_images:
            raise ConfigError(
                f"num_images is {num_images}, but --from_images {self.folder} holds {self.num_images}. Ask for fewer."
            )
        if set(self.manifest["of"]) != set(KINDS):
            raise ConfigError(
                f"--from_images {self.folder} holds no pairs of teacher and student. Use modiff evaluate."
            )

    def count(self) -> int:
        """Batches that can be read."""
        return -(-self.num_images // self.batch_size)

    def load(self, first_index: int) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """The images from ``first_index`` on, in [-1, 1]; behind the last one they are black."""
        stop = first_index + self.batch_size
        found = self.images(first_index, min(stop, self.num_images))
        empty = torch.full((max(stop - max(self.num_images, first_index), 0), *self.manifest["shape"]), -1.0)
        facts = {key: self.manifest[key] for key in ("evaluations", "quantized") if self.manifest.get(key) is not None}
        return {kind: torch.cat([images, empty]) for kind, images in found.items()}, facts

    def images(self, first: int, stop: int) -> dict[str, Tensor]:
        """Images ``first`` to ``stop - 1`` of teacher and student, in [-1, 1]."""
        found: dict[str, list[Tensor]] = {kind: [torch.empty(0, *self.manifest["shape"])] for kind in KINDS}
        place = first
        while place < stop:
            shard = self._shard(place // self.size)
            begin = place % self.size
            taken = min(self.size - begin, stop - place)
            for kind in KINDS:
                found[kind].append(shard[kind][begin : begin + taken])
            place += taken
        return {kind: torch.cat(parts) for kind, parts in found.items()}

    def shard_path(self, number: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard-{number:06d}.{self.manifest['kind']}"

    def _shard(self, number: int) -> dict[str, Tensor]:
        if self._last is None or self._last[0] != number:
            path = self.shard_path(number)
            try:
                read = _read_tar if path.suffix == ".tar" else _read_npz
                self._last = number, {kind: _floats(pixels) for kind, pixels in read(path).items()}
            except (OSError, ValueError, KeyError, tarfile.TarError) as error:
                raise CheckpointError(
                    f"{path} is missing or damaged ({str(error).splitlines()[0]}). Draw it again."
                ) from error
        return self._last[1]


def _read_tar(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    with tarfile.open(path) as tar:
        for entry in tar:
            kind = entry.name.split(".")[1]
            if kind in found:
                file = tar.extractfile(entry)
                assert file is not None
                found[kind].append(_channels_last(np.array(Image.open(file))))
    return {kind: np.stack(pixels) for kind, pixels in found.items()}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {"teacher": file["teacher"], "student": file["arr_0"]}


def _floats(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1


def disk_need(num_images: int, shape: tuple[int, ...], kinds: int, shards: bool, pictures: bool) -> int:
    """Bytes that a run takes on the disk at most: finished batches in float32, and images of 8 bits.

    >>> disk_need(1000, (3, 32, 32), 2, True, False) == 1000 * 2 * 3072 * (4 + 1) + 1000 * 2 * 2048
    True
    """
    pixels = int(np.prod(shape))
    eight_bit = (shards + pictures) * (pixels + 2048)  # a header and padding for each
    return num_images * kinds * (4 * pixels + eight_bit)


def say_disk_need(folder: Path, need: int) -> None:
    """Say what a large run takes, and refuse one that cannot fit.

    Raises:
        ConfigError: Less is free than is needed.
    """
    where = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(where).free
    unit, size = ("GiB", 2**30) if need >= 2**30 else ("MiB", 2**20)
    need_, there_, free_ = (f"{value / size:.2f}" for value in (need, there, free))
    text = f"up to {need_} {unit} on the disk, of which {there_} are there; {free_} are free"
    if need - there > free:
        raise ConfigError(f"The run needs {text}. Free some, draw fewer images, or give another --output.")
    if need > 2**28:
        print(f"The run needs {text}.")
