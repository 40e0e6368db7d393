"""Pictures to pixels: one place that knows how deep a picture is and which files of a folder are pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from modiff.errors import ConfigError
from modiff.lit.runs.running import rank_zero

DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of Pillow with 16 bits of grey; its own ``convert`` clips them at 255 instead of scaling them."""


def unit_pixels(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """The pixels of a picture in [0, 1], float64 ``[H, W]`` (grey) or ``[H, W, 3]``.

    Args:
        image: Any picture of 1, 8 or 16 bits per channel.
        channels: 1 (grey) or 3 (RGB); the picture is converted.
        name: Of the picture, for the error.

    Raises:
        ConfigError: Nothing says which number is white: 32-bit integers of another format than PNG and PNM, and floats.
    """
    # Pillow hands out 16-bit grey of PNM files, and of PNG files in older versions, as 32-bit integers.
    if image.mode in DEEP or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.float64) / 65535
        return grey if channels == 1 else np.repeat(grey[..., None], 3, axis=2)
    if image.mode.startswith(("I", "F")):
        raise ConfigError(
            f"Image {name} has pixels of the mode {image.mode!r} (32-bit), which do not say what white is. Convert it "
            "to 8 or 16 bits per channel."
        )
    return np.array(image.convert("L" if channels == 1 else "RGB")).astype(np.float64) / 255


def byte_pixels(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """The same as uint8, rounded to nearest; 8-bit pictures keep their numbers."""
    return np.rint(unit_pixels(image, channels, name) * 255).astype(np.uint8)


def say_left_out(folder: str | Path, files: Iterable[Path], taken: Iterable[Path], what: str) -> None:
    """Print one line, on rank 0, that counts the files of a folder that are not used, by their endings.

    Hidden files, and those that describe a data set in words, are not counted.
    """
    used = set(taken)
    unused = [f for f in files if f.is_file() and f not in used and not f.name.startswith(".")]
    endings = Counter(f.suffix.lower() or "no ending" for f in unused)
    for ending in (".md", ".txt", ".json", ".jsonl", ".csv", ".html"):
        endings.pop(ending, None)
    if endings:
        counts = ", ".join(f"{count} with {ending}" for ending, count in sorted(endings.items()))
        rank_zero(print, f"{folder}: left out {counts}; {what}.")
