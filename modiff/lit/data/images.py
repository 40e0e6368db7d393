"""The data module of a training: images of a hub data set, of local parquet files, or of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from modiff.errors import ConfigError
from modiff.lit.data.batches import DeviceBatches, ImageDataset
from modiff.lit.data.decoding import byte_pixels, say_left_out


class ImageDataModule(LightningDataModule):
    """Images of a Hugging Face data set: a hub name, local parquet, or a folder of images.

    Args:
        name: Name on the hub, used when ``path`` is not given.
        path: Folder with ``train*.parquet`` and ``test*.parquet``, or an image folder (``train/<class>/*.png``).
        image_size: Height and width; smaller images are padded with black, larger ones refused.
        channels: 1 (grey) or 3 (RGB).
        batch_size: Images per batch and rank.
        limit_train: Use the first images only (for quick trials); None for all.
        horizontal_flips: Mirror each training image left to right with probability 1/2.
        on_device: Hold all images on the training device as uint8 and cut batches there, instead of on the CPU.
    """

    def __init__(
        self,
        name: str = "ylecun/mnist",
        path: str | None = None,
        image_size: int = 32,
        channels: int = 1,
        batch_size: int = 128,
        limit_train: int | None = None,
        horizontal_flips: bool = False,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ConfigError(f"data.channels is {channels}; allowed are 1 (grey) and 3 (RGB).")
        if batch_size < 1:
            raise ConfigError(f"data.batch_size is {batch_size}; allowed are whole numbers, 1 or more.")
        if path is not None and not Path(path).exists():
            raise ConfigError(f"data.path {path!r} does not exist. Give a folder with parquet files or images.")
        self.name = name
        self.path = path
        self.image_size = image_size
        self.channels = channels
        self.batch_size = batch_size
        self.limit_train = limit_train
        self.horizontal_flips = horizontal_flips
        self.on_device = on_device
        self.train_set: ImageDataset | None = None
        self.test_set: ImageDataset | None = None

    def prepare_data(self) -> None:
        """Download once per node, before the ranks read."""
        if self.path is None:
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Decode all images into memory."""
        if self.train_set is None:
            splits = self._load()
            if not {"train", "test"} <= set(splits):
                raise ConfigError(
                    f"Data set {self.name!r} has the splits {', '.join(splits)}; needed are train and test. Give a "
                    "folder with both: --data.path FOLDER."
                )
            self.train_set = self._decode(splits["train"], self.limit_train)
            self.train_set.flips = self.horizontal_flips
            self.test_set = self._decode(splits["test"], None)
        if stage == "fit" and len(self.train_set) < self.batch_size:
            raise ConfigError(
                f"data.batch_size is {self.batch_size}, but there are only {len(self.train_set)} training images. "
                "Use a smaller batch."
            )

    def train_dataloader(self) -> DeviceBatches:
        """Shuffled training batches; incomplete ones are dropped."""
        assert self.train_set is not None
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DeviceBatches:
        """Test images in order."""
        assert self.test_set is not None
        return self._loader(self.test_set, shuffle=False)

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, index: int) -> dict[str, Tensor]:
        """Leave the numbers on the CPU: random numbers are drawn there, and the device is not waited for."""
        moved = super().transfer_batch_to_device({k: v for k, v in batch.items() if k != "number"}, device, index)
        return {**moved, "number": batch["number"]}

    def _loader(self, dataset: ImageDataset, shuffle: bool) -> DeviceBatches:
        device = self.trainer.strategy.root_device if self.trainer and self.on_device else torch.device("cpu")
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return DeviceBatches(dataset, self.batch_size, device, shuffle, torch.initial_seed(), world, rank)

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        if self.path is None:
            return self._load_from_hub()
        folder = Path(self.path)
        files = {split: sorted(str(f) for f in folder.glob(f"{split}*.parquet")) for split in ("train", "test")}
        try:
            if all(files.values()):
                return datasets.load_dataset("parquet", data_files=files)
            if (folder / "train").is_dir() and (folder / "test").is_dir():
                _say_left_out(folder)
                return datasets.load_dataset("imagefolder", data_dir=str(folder))
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError(f"data.path {self.path!r} cannot be read ({reason}). Copy the files again.") from error
        raise ConfigError(
            f"data.path {self.path!r} holds neither train*.parquet and test*.parquet nor train/ and test/ folders."
        )

    def _load_from_hub(self) -> Any:
        import datasets
        import huggingface_hub

        try:
            huggingface_hub.HfApi().dataset_info(self.name, timeout=10)
        except Exception as error:
            try:
                config = datasets.DownloadConfig(local_files_only=True, max_retries=0)
                return datasets.load_dataset(self.name, download_config=config)
            except Exception:
                raise ConfigError(
                    f"Data set {self.name!r} is neither on the hub within reach nor in the local cache "
                    f"({type(error).__name__}). Give local parquet files: --data.path FOLDER."
                ) from error
        return datasets.load_dataset(self.name)

    def _decode(self, split: Any, limit: int | None) -> ImageDataset:
        column = next((c for c in ("image", "img") if c in split.column_names), None)
        if column is None or "label" not in split.column_names:
            raise ConfigError(
                f"The data set has the columns {split.column_names}; needed are image (or img) and label."
            )
        if limit is not None:
            split = split.select(range(min(limit, len(split))))
        size = self.image_size
        out = torch.zeros(len(split), self.channels, size, size, dtype=torch.uint8)
        for i, image in enumerate(split[column]):
            if max(image.size) > size:
                raise ConfigError(f"Image {i} is {image.size}, larger than data.image_size {size}. Raise it.")
            pixels = torch.from_numpy(byte_pixels(image, self.channels, str(i)))
            pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
            top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
            out[i, :, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        return ImageDataset(out, torch.as_tensor(split["label"]))


def _say_left_out(folder: Path) -> None:
    """Say which files of an image folder the loader of ``datasets`` does not read."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    everything = [f for split in ("train", "test") for f in sorted((folder / split).rglob("*"))]
    taken = [f for f in everything if f.suffix.lower() in ImageFolder.EXTENSIONS]
    say_left_out(folder, everything, taken, "the loader of image folders does not read them")
