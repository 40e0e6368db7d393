"""Deep pictures keep their brightness, and no file of a folder is left out without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from modiff.errors import ConfigError
from modiff.lit.data.decoding import byte_pixels, unit_pixels
from modiff.lit.data.images import ImageDataModule
from modiff.lit.data.real_images import ReferenceImages

RAMP = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)  # its mean is 32256 / 65535 = .492


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_keeps_its_brightness_in_reference_images(tmp_path, ending, channels) -> None:
    Image.fromarray(RAMP).save(tmp_path / f"ramp.{ending}")
    (image,) = ReferenceImages(tmp_path, (channels, 8, 8))
    expected = torch.from_numpy(RAMP.astype(np.float64) / 65535).float().expand(channels, 8, 8)
    assert torch.equal(image, expected)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_brightness_in_training_images(tmp_path, ending) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(RAMP).save(tmp_path / folder / f"ramp.{ending}")
    data = ImageDataModule(path=str(tmp_path), image_size=8, channels=3)
    data.setup()
    expected = np.rint(RAMP / 65535 * 255).astype(np.uint8)
    assert np.array_equal(data.train_set.images[0].numpy(), np.stack([expected] * 3))


def test_eight_bit_pixels_keep_their_numbers() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(pixels)
    assert np.array_equal(byte_pixels(image, 1, "x"), pixels)
    as_before = torch.from_numpy(pixels).float().div(255)
    assert torch.equal(torch.from_numpy(unit_pixels(image, 1, "x")).float(), as_before)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_white_are_refused(tmp_path, dtype) -> None:
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "ramp.tif")
    with pytest.raises(ConfigError, match=r"ramp\.tif has pixels of the mode '[FI]' \(32-bit\).*Convert it to 8 or 16"):
        ReferenceImages(tmp_path, (1, 8, 8))


@pytest.mark.parametrize("ending", ["tif", "tiff", "ppm", "pgm", "PNG", "bmp", "gif"])
def test_reference_folder_reads_every_ending(tmp_path, ending) -> None:
    Image.new("L", (8, 8), 51).save(tmp_path / f"grey.{ending}")
    (image,) = ReferenceImages(tmp_path, (1, 8, 8))
    assert torch.equal(image, torch.full((1, 8, 8), 51.0) / 255)


def test_reference_folder_says_what_it_leaves_out(tmp_path, capsys) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.avif", "c.avif", "d.heic", "readme.md", ".hidden.xyz"):
        (tmp_path / name).write_bytes(b"x")
    assert len(list(ReferenceImages(tmp_path, (1, 8, 8)))) == 1
    assert "left out 2 with .avif, 1 with .heic; read are .png" in capsys.readouterr().out


def test_reference_folder_says_that_parquet_excludes_pictures(tmp_path: Path, capsys) -> None:
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    rows = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"img": rows, "label": [0]}), tmp_path / "b.PARQUET")
    assert len(list(ReferenceImages(tmp_path, (1, 8, 8)))) == 1
    assert "left out 1 with .png; parquet files alone where there are any" in capsys.readouterr().out


def test_complete_folders_say_nothing(tmp_path, capsys) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    list(ReferenceImages(tmp_path, (1, 8, 8)))
    assert capsys.readouterr().out == ""


def test_training_folder_says_what_it_leaves_out(tmp_path, capsys) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / folder / "1.png")
        (tmp_path / folder / "2.heic").write_bytes(b"x")
    data = ImageDataModule(path=str(tmp_path), image_size=8)
    data.setup()
    assert len(data.train_set) == 2
    assert "left out 4 with .heic; the loader of image folders does not read them" in capsys.readouterr().out
