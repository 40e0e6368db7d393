"""Real images as a reference: measured once, kept by content, the same figures as from their statistics."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from modiff.errors import ConfigError
from modiff.lit.reference import ReferenceImages, network_identity
from modiff.metrics.features import load_feature_network
from modiff.metrics.statistics import FeatureStatistics

SHAPE = (3, 8, 8)


class Network(torch.nn.Module):
    """Two features: mean of the red channel, mean of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0].mean(dim=(1, 2)), x.mean(dim=(1, 2, 3))], dim=1)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "red.pt"
    torch.jit.script(Network()).save(str(path))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)


def parquet(path: Path, images: list[bytes], column: str = "img") -> Path:
    rows = [{"bytes": image, "path": None} for image in images]
    pyarrow.parquet.write_table(pyarrow.table({column: rows, "label": [0] * len(rows)}), path)
    return path


def measure(path: Path, network: Path) -> FeatureStatistics:
    images = ReferenceImages(path, SHAPE)
    return images.statistics(load_feature_network(network), network_identity(network), torch.device("cpu"))


def test_statistics_are_those_of_the_pixels_in_both_forms(tmp_path, network, pixels) -> None:
    images = [png(image) for image in pixels]
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        (folder / f"{i:03d}.png").write_bytes(image)
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    expected = FeatureStatistics.from_features(Network()(floats), "red")
    for path in (parquet(tmp_path / "some.parquet", images), tmp_path / "images"):
        found = measure(path, network)
        assert found.network == "red"
        assert found.num_images == 70
        torch.testing.assert_close(found.mean, expected.mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.covariance, expected.covariance, atol=1e-6, rtol=0)


def test_images_are_measured_once_and_again_when_their_content_changes(
    tmp_path, network, pixels, capsys, cache
) -> None:
    images = [png(image) for image in pixels]
    path = parquet(tmp_path / "some.parquet", images)
    first = measure(path, network)
    assert capsys.readouterr().out.count("Measuring the reference images") == 1
    assert torch.equal(measure(path, network).mean, first.mean)
    assert "Measuring" not in capsys.readouterr().out
    parquet(path, images[:-1])
    assert measure(path, network).num_images == 69
    assert len(list(cache.iterdir())) == 2


def test_evaluate_compares_with_images_as_with_their_statistics(tmp_path, network, pixels, modiff) -> None:
    path = parquet(tmp_path / "train.parquet", [png(image) for image in pixels], column="image")
    statistics = tmp_path / "red.safetensors"
    measure(path, network).save(statistics)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"""
wandb: disabled
error_images: 1
timing_rounds: 1
num_images: 6
model:
  teacher: {{name: ddpm-cifar10, tiny: true}}
  preset: w8a4-modiff
  scheduler: ddim
  steps: 2
  features: {network}
data: {{batch_size: 3}}
trainer: {{accelerator: cpu, enable_progress_bar: false}}
""")
    figures = []
    for reference in (path, statistics):
        output = tmp_path / f"out-{reference.suffix[1:]}"
        status, _, err = modiff("evaluate", "--config", recipe, "--model.reference", reference, "--output", output)
        assert status == 0, err
        figures.append(json.loads((output / "metrics.json").read_text()))
    for who in ("teacher", "student"):
        assert figures[0][who]["fid"] == figures[1][who]["fid"] > 0
    assert figures[0]["features"]["network"] == "red"
    assert figures[0]["features"]["num_reference_images"] == 70


@pytest.mark.parametrize(
    ("images", "column", "message"),
    [
        (1, "img", r"A covariance needs at least 2 images, got 1"),
        (0, "img", r"holds no images\. Give a folder of \.png"),
        (2, "picture", r"has the columns picture, label; needed is image or img"),
    ],
)
def test_too_few_images_or_no_such_column(images, column, message, tmp_path, network, pixels) -> None:
    path = parquet(tmp_path / "some.parquet", [png(image) for image in pixels[:images]], column)
    if images == 0:
        path = tmp_path / "empty"
        path.mkdir()
    with pytest.raises(ConfigError, match=message):
        measure(path, network)


def test_image_of_another_size_or_damaged(tmp_path, network, pixels) -> None:
    path = parquet(tmp_path / "some.parquet", [png(pixels[0]), png(pixels[0][:4])])
    with pytest.raises(ConfigError, match=r"parquet\[1\] is 8x4, but the teacher draws 8x8\. Crop or resize"):
        measure(path, network)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        measure(parquet(path, [png(pixels[0]), b"no image"]), network)
    path.write_text("no parquet")
    with pytest.raises(ConfigError, match=r"is no parquet file, or damaged"):
        measure(path, network)
