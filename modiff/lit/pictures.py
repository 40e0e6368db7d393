"""Pictures: grids of images and plots."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modiff.lit.rundir import atomic_write


def image_grid(images: Tensor, columns: int, pad: int = 2, zoom: int = 2) -> Image.Image:
    """Arrange images ``[N, C, H, W]`` in [0, 1] in rows of ``columns``; each pixel drawn ``zoom`` times as large."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.ones(channels, rows * (height + pad) + pad, columns * (width + pad) + pad)
    for i, image in enumerate(images.clamp(0, 1)):
        top = (i // columns) * (height + pad) + pad
        left = (i % columns) * (width + pad) + pad
        canvas[:, top : top + height, left : left + width] = image
    picture = Image.fromarray(to_pixels(canvas))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def to_pixels(image: Tensor) -> np.ndarray:
    """One image ``[C, H, W]`` in [0, 1] as uint8 ``[H, W]`` (grey) or ``[H, W, 3]``."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels[..., 0] if image.shape[0] == 1 else pixels


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture atomically."""
    atomic_write(path, picture.save)
