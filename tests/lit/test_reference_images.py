"""Real images as a reference: measured once, kept by content, figures those of their statistics and features."""

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
from safetensors.torch import load_file

from modiff.errors import ConfigError
from modiff.lit.data import real_images as reference_module
from modiff.lit.data.real_images import ReferenceImages, network_identity
from modiff.metrics.features import load_feature_network
from modiff.metrics.precision_recall import precision_recall
from modiff.metrics.statistics import FeatureStatistics
from modiff.storage.cache import cache_folder

SHAPE = (3, 8, 8)


RECIPE = """
wandb: disabled
error_images: 1
timing_rounds: 0
num_images: 6
model:
  teacher: {{name: ddpm-cifar10, tiny: true}}
  preset: w8a4-modiff
  scheduler: ddim
  steps: 2
  features: {network}
  reference: {reference}
data: {{batch_size: 3}}
trainer: {{accelerator: cpu, enable_progress_bar: false}}
"""


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


def test_features_of_few_images_are_all_kept(tmp_path, network, pixels) -> None:
    path = parquet(tmp_path / "some.parquet", [png(image) for image in pixels])
    kept = measure(path, network).features
    assert kept.dtype == torch.float32
    expected = features_of(pixels)
    assert torch.allclose(kept.sort(dim=0).values, expected.sort(dim=0).values, atol=1e-6)


def features_of(pixels: np.ndarray) -> torch.Tensor:
    return Network()(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


def test_of_more_images_than_the_bound_a_fair_sample_is_kept(tmp_path, network, monkeypatch) -> None:
    """Sorted by class: the red channel grows with the position. Neither one end is kept, nor other images next time."""
    monkeypatch.setattr(reference_module, "MAX_KEPT", 40)
    monkeypatch.setattr(reference_module, "BATCH", 7)
    ramp = np.zeros((200, 8, 8, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(200)[:, None, None]
    path = parquet(tmp_path / "ramp.parquet", [png(image) for image in ramp])
    found = measure(path, network)
    assert found.num_images == 200
    assert found.features.shape == (40, 2)
    positions = (found.features[:, 0] * 255).round().long()
    assert len(positions.unique()) == 40
    quarters = [int(((positions >= low) & (positions < low + 50)).sum()) for low in range(0, 200, 50)]
    assert min(quarters) >= 4
    for cached in cache_folder("statistics").iterdir():
        cached.unlink()
    monkeypatch.setattr(reference_module, "BATCH", 64)
    torch.testing.assert_close(measure(path, network).features, found.features, atol=1e-7, rtol=0)


def test_memory_is_bounded_while_measuring(tmp_path, network, monkeypatch) -> None:
    """At most twice the bound and a batch of features are held at a time."""
    held = []
    update = reference_module.ImageFidelity.update

    def watched(self, *args) -> None:
        update(self, *args)
        held.append(sum(len(part) for part in self.reference_kept))

    monkeypatch.setattr(reference_module, "MAX_KEPT", 10)
    monkeypatch.setattr(reference_module, "BATCH", 4)
    monkeypatch.setattr(reference_module.ImageFidelity, "update", watched)
    some = np.random.default_rng(1).integers(0, 256, (90, 8, 8, 3), dtype=np.uint8)
    assert len(measure(parquet(tmp_path / "some.parquet", [png(i) for i in some]), network).features) == 10
    assert len(held) == 23
    assert max(held) <= 20


@pytest.mark.parametrize("old", ["no features", "other bound", "damaged"])
def test_a_cache_without_the_features_is_measured_again(old, tmp_path, network, pixels, capsys, cache) -> None:
    path = parquet(tmp_path / "some.parquet", [png(image) for image in pixels])
    first = measure(path, network)
    (cached,) = cache.iterdir()
    if old == "damaged":
        cached.write_bytes(cached.read_bytes()[:100])
    else:
        features = None if old == "no features" else first.features[:50]
        FeatureStatistics(first.mean, first.covariance, 70, "red", features=features).save(cached)
    capsys.readouterr()
    assert torch.equal(measure(path, network).features, first.features)
    assert "Measuring the reference images" in capsys.readouterr().out
    assert torch.equal(FeatureStatistics.load(cached).features, first.features)
    assert list(cache.iterdir()) == [cached]


def evaluate(modiff, tmp_path: Path, network: Path, reference: Path, name: str, *more: str) -> tuple[dict, Path, str]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.format(network=network, reference=reference))
    output = tmp_path / name
    status, out, err = modiff("evaluate", "--config", recipe, "--output", output, *more)
    assert status == 0, err
    return json.loads((output / "metrics.json").read_text()), output, out


def test_evaluate_measures_precision_and_recall_against_the_images(
    tmp_path, network, pixels, modiff, monkeypatch
) -> None:
    """The figures are those of the features of both sets; from the cache too; and of the kept ones only."""
    near = pixels.copy()
    near[::2] = near[::2] // 4 + 96  # half of them grey like what the teacher draws
    path = parquet(tmp_path / "train.parquet", [png(image) for image in near], column="image")
    first, output, said = evaluate(modiff, tmp_path, network, path, "first")
    again, _, silent = evaluate(modiff, tmp_path, network, path, "again")
    assert ("Measuring" in said, "Measuring" in silent) == (True, False)
    drawn = load_file(output / "samples.safetensors")
    for who in ("teacher", "student"):
        expected = precision_recall(features_of(near), Network()(drawn[who]))
        assert (first[who]["precision"], first[who]["recall"]) == pytest.approx(expected, abs=1e-12)
        assert (again[who]["precision"], again[who]["recall"]) == (first[who]["precision"], first[who]["recall"])
        assert f"{who}.precision" not in first["reasons"]
    monkeypatch.setattr(reference_module, "MAX_KEPT", 20)
    few, _, said = evaluate(modiff, tmp_path, network, path, "few")
    assert "Measuring" in said
    kept = measure(path, network).features
    assert len(kept) == 20
    expected = precision_recall(kept, Network()(drawn["student"]))
    assert (few["student"]["precision"], few["student"]["recall"]) == pytest.approx(expected, abs=1e-12)


def test_evaluate_compares_with_images_as_with_their_statistics(tmp_path, network, pixels, modiff) -> None:
    path = parquet(tmp_path / "train.parquet", [png(image) for image in pixels], column="image")
    whole = measure(path, network)
    FeatureStatistics(whole.mean, whole.covariance, 70, "red").save(tmp_path / "red.safetensors")
    np.savez(tmp_path / "red.npz", mu=whole.mean.numpy(), sigma=whole.covariance.numpy())
    images, _, _ = evaluate(modiff, tmp_path, network, path, "images")
    for name in ("red.safetensors", "red.npz"):
        plain, _, _ = evaluate(modiff, tmp_path, network, tmp_path / name, f"out-{name[4:]}")
        for who in ("teacher", "student"):
            assert images[who]["fid"] == plain[who]["fid"] > 0
            for key in ("precision", "recall"):
                assert images[who][key] is not None
                assert plain[who][key] is None
                reason = plain["reasons"][f"{who}.{key}"]
                assert reason.endswith("need the reference images; these statistics hold none of their features")
    assert images["features"]["network"] == "red"
    assert images["features"]["num_reference_images"] == 70


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
