"""Pictures: grids of images and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modiff.errors import ConfigError
from modiff.storage.atomic import write_file


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


def labelled_rows(
    rows: Sequence[tuple[str, Tensor]], columns: int = 12, zoom: int = 2, font_size: int = 15
) -> Image.Image:
    """Stack one grid of images for each label, the label left of its grid.

    Args:
        rows: Labels (recipes' names) with images ``[N, C, H, W]`` in [0, 1]; N may differ.
        columns: Images in one line; more images take further lines of the same label.
        zoom: Pixels drawn for each pixel of an image.
        font_size: Of the labels, in pixels; long labels are broken after ``_ - . /`` and blanks.

    Raises:
        ConfigError: There is no row, or a row has no image.
    """
    empty = [label for label, images in rows if len(images) == 0]
    if not rows or empty:
        given = f"row {empty[0]!r} has no images" if empty else "there are no rows"
        raise ConfigError(f"labelled_rows: {given}. Give at least one (label, images) with one image each.")
    font = ImageFont.load_default(size=font_size)
    labels = [_wrap(label, font, 12 * font_size) for label, _ in rows]
    grids = [image_grid(images, min(columns, max(len(i) for _, i in rows)), zoom=zoom) for _, images in rows]
    pad, line = font_size, round(1.35 * font_size)
    left = 2 * pad + math.ceil(max(font.getlength(text) for lines in labels for text in lines))
    heights = [max(grid.height, len(lines) * line) for grid, lines in zip(grids, labels, strict=True)]
    mode = "RGB" if any(grid.mode == "RGB" for grid in grids) else "L"
    width = left + max(grid.width for grid in grids)
    picture = Image.new(mode, (width, sum(heights)), "white")
    draw = ImageDraw.Draw(picture)
    top = 0
    for grid, lines, height in zip(grids, labels, heights, strict=True):
        picture.paste(grid, (left, top + (height - grid.height) // 2))
        for i, text in enumerate(lines):
            middle = top + height / 2 + (i - (len(lines) - 1) / 2) * line
            draw.text((left - pad, middle), text, fill="black", font=font, anchor="rm")
        top += height
    return picture


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break ``label`` into lines of at most ``width`` pixels where a separator allows it."""
    lines = [""]
    for piece in re.findall(r"[^_\-./\s]*[_\-./\s]*", label):
        if lines[-1] and font.getlength((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [text.rstrip() for text in lines]


def to_pixels(image: Tensor) -> np.ndarray:
    """One image ``[C, H, W]`` in [0, 1] as uint8 ``[H, W]`` (grey) or ``[H, W, 3]``."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels[..., 0] if image.shape[0] == 1 else pixels


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture atomically."""
    write_file(path, picture.save)
