"""Real images to compare with: their feature statistics and a sample of features, measured once, kept by content."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.data.decoding import say_left_out, unit_pixels
from modiff.metrics.features import count_features, network_name
from modiff.metrics.fidelity import MAX_KEPT, ImageFidelity
from modiff.metrics.statistics import FeatureStatistics
from modiff.storage.cache import cache_folder
from modiff.storage.hashing import hash_file, hash_json

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".gif")
BATCH = 64
DECODING = "16-bit grey is scaled"
"""Names how files become numbers: statistics that were kept by a version which did otherwise are measured again."""


class ReferenceImages:
    """A parquet file of images, or a folder of images or parquet files (all of them, in the order of their names).

    Args:
        path: The file or folder.
        image_shape: ``(C, H, W)`` that every image must have; they are neither resized nor cropped here.

    Raises:
        ConfigError: There are no images, or the first has another size.
    """

    def __init__(self, path: str | Path, image_shape: tuple[int, int, int]) -> None:
        self.path = Path(path)
        self.image_shape = image_shape
        self.files = [self.path]
        if self.path.is_dir():
            everything = sorted(self.path.rglob("*"))
            self.files = [f for f in everything if f.suffix.lower() in IMAGES]
            parquet = [f for f in everything if _is_parquet(f)]
            self.files = parquet or self.files
            read = (
                "parquet files alone where there are any" if parquet else f"read are {', '.join(IMAGES)} and .parquet"
            )
            say_left_out(path, everything, self.files, read)
        first = next(iter(self), None)
        if first is None:
            raise ConfigError(
                f"model.reference {path} holds no images. Give a folder of {', '.join(IMAGES)} or parquet."
            )

    def __iter__(self) -> Iterator[Tensor]:
        """Images as float ``[C, H, W]`` in [0, 1]."""
        for file in self.files:
            pictures = _in_parquet(file) if _is_parquet(file) else [(str(file), file.read_bytes())]
            for name, content in pictures:
                yield self._decode(name, content)

    def _decode(self, name: str, content: bytes) -> Tensor:
        channels, height, width = self.image_shape
        try:
            image = Image.open(io.BytesIO(content))
            pixels = unit_pixels(image, channels, name)
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"Reference image {name} cannot be read ({error}). Remove or replace it.") from error
        if image.size != (width, height):
            raise ConfigError(
                f"Reference image {name} is {image.width}x{image.height}, but the teacher draws {width}x{height}. "
                "Crop or resize the reference images first."
            )
        values = torch.from_numpy(pixels).float()
        return values[None] if values.ndim == 2 else values.permute(2, 0, 1)

    def digest(self) -> str:
        """Content hash of all files, in order, and of the size."""
        return hash_json([DECODING, list(self.image_shape), *(hash_file(file) for file in self.files)])

    def statistics(self, network: nn.Module, identity: str, device: torch.device) -> FeatureStatistics:
        """Feature statistics, read from the cache where the same images and network were measured before.

        They hold features for precision and recall: of every image, or of ``MAX_KEPT`` (10,000) where there are more.
        Which ones depends on an image's position alone, by the pseudo-random order in which
        :class:`modiff.metrics.fidelity.ImageFidelity` keeps generated ones: a fair sample of images sorted by class,
        and the same one in every run and on every rank. The file takes up to ``4 * MAX_KEPT * D`` bytes for them; one
        without (an earlier version's) or a damaged one is measured again. Memory does not grow with the images: sums
        in float64 and at most twice ``MAX_KEPT`` features.

        Args:
            network: Feature network, on ``device``.
            identity: Content hash of the network.
            device: Where the images are measured.

        Raises:
            ConfigError: An image is damaged or of another size, or there is only one.
        """
        name = network_name(network)
        key = hash_json([self.digest(), identity, name])[:32]
        cached = cache_folder("statistics") / f"{key}.safetensors"
        found = _read_cached(cached)
        if found is not None:
            return found
        print(f"Measuring the reference images in {self.path} with {name}, once; kept in {cached.parent}.", flush=True)
        num_features = count_features(network, torch.zeros(2, *self.image_shape, device=device))
        metric = ImageFidelity(network, num_features=num_features, max_kept=MAX_KEPT).to(device)
        first = 0
        for batch in _batches(iter(self)):
            metric.update(batch.to(device), "reference", torch.arange(first, first + len(batch)))
            first += len(batch)
        found = metric.statistics("reference", with_features=True)
        found.save(cached)
        return found


def _is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


def _read_cached(path: Path) -> FeatureStatistics | None:
    """Cached statistics with as many features as they should hold; None if they have to be measured (again)."""
    if not path.is_file():
        return None
    try:
        found = FeatureStatistics.load(path)
    except CheckpointError:
        return None
    complete = found.num_images is not None and found.features is not None
    return found if complete and len(found.features) == min(found.num_images, MAX_KEPT) else None


def is_statistics(path: str | Path) -> bool:
    """Whether a reference is a file of statistics rather than of images."""
    return Path(path).suffix in (".npz", ".safetensors") or not Path(path).exists()


def network_identity(path: str | Path) -> str:
    """Content hash of a feature network's file; ``inception`` has one set of weights and stands for itself."""
    return hash_file(Path(path)) if Path(path).is_file() else str(path)


def _batches(images: Iterator[Tensor]) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == BATCH:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def _in_parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"model.reference {path} is no parquet file, or damaged: {error}. Copy it again.") from error
    names = file.schema_arrow.names
    column = next((name for name in ("image", "img") if name in names), None)
    if column is None:
        raise ConfigError(f"{path} has the columns {', '.join(names)}; needed is image or img. Rename the column.")
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield f"{path}[{row}]", _bytes(value, path)
            row += 1


def _bytes(value: Any, path: Path) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ConfigError(f"{path} holds no bytes of images. Give a parquet file with the images inside.")
    return content
