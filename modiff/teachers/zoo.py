"""Teachers by name: the one table, and how one is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from modiff.errors import CheckpointError, ConfigError

ASSETS = Path(str(files("modiff"))) / "teachers" / "assets"


@dataclass(frozen=True)
class Entry:
    """One row of the zoo.

    Args:
        folder: A diffusers pipeline folder.
        features: Feature network for a Fréchet distance, or None.
        statistics: Its statistics of the real images, or None.
    """

    folder: Path
    features: Path | None = None
    statistics: Path | None = None


ZOO: dict[str, Entry] = {
    "mnist": Entry(
        ASSETS / "mnist", ASSETS / "mnist" / "features.safetensors", ASSETS / "mnist" / "feature_statistics.safetensors"
    ),
}


@dataclass(frozen=True)
class TeacherSpec:
    """Which pretrained denoiser.

    Args:
        name: A name of the zoo; unused when ``path`` is given.
        path: A local diffusers pipeline folder (``unet/`` and ``scheduler/``), such as ``modiff train`` exports.

    Raises:
        ConfigError: The name is unknown.
    """

    name: str = "mnist"
    path: str | None = None

    def __post_init__(self) -> None:
        if self.path is None and self.name not in ZOO:
            raise ConfigError(
                f"unknown teacher {self.name!r}; allowed are {', '.join(ZOO)}. For your own give model.teacher.path."
            )

    @property
    def entry(self) -> Entry:
        """Where its files are."""
        return ZOO[self.name] if self.path is None else Entry(Path(self.path))

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        return self.name if self.path is None else Path(self.path).name


@dataclass
class Teacher:
    """A loaded teacher.

    Args:
        denoiser: In evaluation mode, gradients off.
        scheduler_config: Of the scheduler it was trained with.
        sample_shape: ``(channels, height, width)`` of x_t.
        fingerprint: Content hash of weights and configuration.
    """

    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    sample_shape: tuple[int, int, int]
    fingerprint: str


def load_teacher(spec: TeacherSpec) -> Teacher:
    """Load a teacher from disk; nothing is downloaded.

    Raises:
        CheckpointError: A file is missing, truncated, or not of the architecture its config names.
    """
    from diffusers import UNet2DModel

    folder = spec.entry.folder
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    scheduler = folder / "scheduler" / "scheduler_config.json"
    for file in (weights, folder / "unet" / "config.json", scheduler):
        if not file.is_file():
            raise CheckpointError(
                f"Teacher {spec.title!r}: {file} does not exist. Give model.teacher.path a diffusers pipeline folder "
                "with unet/ and scheduler/, such as `modiff train` exports."
            )
    try:
        denoiser = UNet2DModel.from_pretrained(
            folder / "unet", local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
        scheduler_config = json.loads(scheduler.read_text())
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"Teacher {spec.title!r}: the files in {folder} are damaged or of another architecture ({first}). "
            "Copy or train them again."
        ) from error
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        # Loaded weights are views into a mapped file whose alignment varies, and with it the last bits of a product.
        tensor.data = tensor.data.clone()
    size = denoiser.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Teacher(
        denoiser.eval().requires_grad_(False),
        scheduler_config,
        (denoiser.config.in_channels, height, width),
        _fingerprint(weights, folder / "unet" / "config.json", scheduler),
    )


def _fingerprint(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
