"""Files of feature statistics, and feature networks: what is read, written and refused."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.features import (
    FeatureClassifier,
    count_features,
    extract,
    load_feature_network,
    network_name,
)
from modiff.metrics.fidelity import FeatureStatistics, ImageFidelity, frechet_distance
from tests.unit.feature_networks import SETS, D, Pixels, Plain, S, filled, images, numpy_frechet


def test_statistics_of_one_image_are_refused():
    with pytest.raises(ConfigError, match="at least 2 images, got 1"):
        FeatureStatistics.from_features(torch.rand(1, 4))
    with pytest.raises(ConfigError, match="at least 2 images, got 0 of the student"):
        ImageFidelity(Pixels()).statistics("student")


def test_reference_of_another_network_or_dimension_is_refused():
    with pytest.raises(ConfigError, match="of feature network 'other', but 'pixels' is in use"):
        ImageFidelity(Pixels(), FeatureStatistics.from_features(torch.rand(30, D), "other"))
    with pytest.raises(ConfigError, match=r"have 7 features \(a network the file does not name\).*'pixels' has 6"):
        ImageFidelity(Pixels(), FeatureStatistics.from_features(torch.rand(30, 7)))
    with pytest.raises(ConfigError, match="have 9 spatial features.*has 5"):
        ImageFidelity(Pixels(), FeatureStatistics.from_features(torch.rand(30, D), None, torch.rand(30, 9)))
    a, b = (FeatureStatistics.from_features(torch.rand(30, d), f"net{d}") for d in (3, 4))
    with pytest.raises(ConfigError, match="'net3', but 'net4'"):
        frechet_distance(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": torch.zeros(3), "covariance": torch.eye(4)}, r"got \[3\] and \[4, 4\]"),
        ({"mean": torch.zeros(2), "covariance": torch.full((2, 2), float("inf"))}, "NaN or Inf"),
        ({"mean": torch.zeros(2), "covariance": torch.eye(2), "spatial_mean": torch.zeros(2)}, "come together"),
    ],
)
def test_malformed_statistics_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        FeatureStatistics(**fields)


def test_statistics_round_trip(tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics = FeatureStatistics.from_features(torch.rand(30, 5), "mnist-classifier", torch.rand(30, 3))
    statistics.save(path)
    read = FeatureStatistics.load(path)
    for name in ("mean", "covariance", "spatial_mean", "spatial_covariance"):
        assert torch.equal(getattr(read, name), getattr(statistics, name))
        assert getattr(read, name).dtype == torch.float64
    assert (read.num_images, read.network, read.num_features) == (30, "mnist-classifier", 5)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]
    bare = FeatureStatistics(torch.zeros(2), torch.eye(2))
    bare.save(path)
    assert (FeatureStatistics.load(path).num_images, FeatureStatistics.load(path).network) == (None, None)


def test_shipped_layout_is_read(tmp_path):
    """Mean, covariance and count, as packaged teachers ship them; a file without the network's name is accepted."""
    from safetensors.torch import save_file

    features = torch.rand(50, 4).double()
    path = tmp_path / "feature_statistics.safetensors"
    tensors = {"mean": features.mean(0), "covariance": torch.cov(features.T), "num_images": torch.tensor(50)}
    save_file(tensors, str(path))
    read = FeatureStatistics.load(path)
    assert (read.num_images, read.network) == (50, None)
    assert frechet_distance(read, FeatureStatistics.from_features(features, "any")) == pytest.approx(0, abs=1e-12)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    FeatureStatistics(torch.zeros(2), torch.eye(2)).save(path)

    def full_disk(tensors: dict, target: os.PathLike, metadata: dict | None) -> None:
        open(target, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modiff.metrics.statistics.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        FeatureStatistics(torch.ones(3), torch.eye(3)).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.safetensors"]
    assert FeatureStatistics.load(path).num_features == 2


def test_foreign_npz_layouts(tmp_path):
    rng = np.random.default_rng(0)
    pooled, spatial = rng.normal(size=(40, 6)), rng.normal(size=(40, 5)).astype(np.float32)
    arrays = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    np.savez_compressed(tmp_path / "pytorch_fid.npz", **arrays)
    arrays.update(mu_s=spatial.mean(0), sigma_s=np.cov(spatial, rowvar=False))
    np.savez(tmp_path / "guided_diffusion.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    plain = FeatureStatistics.load(tmp_path / "pytorch_fid.npz")
    assert np.array_equal(plain.mean.numpy(), arrays["mu"])
    assert np.array_equal(plain.covariance.numpy(), arrays["sigma"])
    assert (plain.spatial, plain.num_images, plain.network) == (None, None, None)
    guided = FeatureStatistics.load(tmp_path / "guided_diffusion.npz")
    assert np.array_equal(guided.spatial.covariance.numpy(), arrays["sigma_s"])
    sets = {"teacher": SETS["teacher"]}
    row = filled(ImageFidelity(Pixels(), guided), sets).compute()["teacher"]
    flat = SETS["teacher"].flatten(1).numpy()
    assert row["fid"] == pytest.approx(numpy_frechet(pooled, flat[:, :D]), abs=1e-6)
    assert row["sfid"] == pytest.approx(numpy_frechet(spatial, flat[:, D : D + S]), abs=1e-6)


def test_missing_or_damaged_statistics_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.npz do not exist.*mu and sigma"):
        FeatureStatistics.load(tmp_path / "nothing.npz")
    good = tmp_path / "good.safetensors"
    FeatureStatistics.from_features(torch.rand(30, 5)).save(good)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "good.npz", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(2), sigma=np.eye(3))
    for name in ("good.safetensors", "good.npz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"short_{name}").write_bytes(content[: len(content) // 2])
    FeatureClassifier().save(tmp_path / "network.safetensors")
    for name, why in [
        ("short_good.safetensors", "damaged"),
        ("short_good.npz", "damaged"),
        ("images.npz", r"it has the arrays \['arr_0'\], not mu and sigma"),
        ("shape.npz", r"got \[2\] and \[3, 3\]"),
        ("network.safetensors", "no tensor named covariance or mean"),
    ]:
        with pytest.raises(CheckpointError, match=f"{name} holds no feature statistics.*{why}"):
            FeatureStatistics.load(tmp_path / name)


def test_feature_classifier_offers_class_scores(tmp_path):
    torch.manual_seed(0)
    network = FeatureClassifier(width=4, num_features=8, name="small").eval()
    pictures = torch.rand(3, 1, 16, 16)
    outputs = extract(network, pictures)
    assert torch.equal(outputs.features, network(pictures))
    assert torch.allclose(outputs.logits, network.logits(pictures), atol=1e-6)
    assert outputs.spatial is None
    network.save(tmp_path / "small.safetensors")
    read = load_feature_network(tmp_path / "small.safetensors")
    assert network_name(read) == "small"
    metric = ImageFidelity(read)
    metric.update(pictures, "student")
    assert metric.compute()["student"]["inception_score"] >= 1


def test_torchscript_network(tmp_path):
    torch.jit.trace(Plain(), images(2, 0)).save(str(tmp_path / "six.pt"))
    network = load_feature_network(tmp_path / "six.pt")
    metric = filled(ImageFidelity(network, num_features=count_features(network, images(2, 0))))
    result = metric.compute()
    assert result["features"]["network"] == "six"
    assert result["student"]["fid"] == pytest.approx(filled(ImageFidelity(Pixels())).compute()["student"]["fid"])


def test_unreadable_networks_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist. Give a .safetensors file, a TorchScript file or"):
        load_feature_network(tmp_path / "none.pt")
    (tmp_path / "noise.pt").write_bytes(b"not a network")
    with pytest.raises(CheckpointError, match="noise.pt is not a TorchScript file"):
        load_feature_network(tmp_path / "noise.pt")


def test_network_for_other_images_is_refused():
    with pytest.raises(ConfigError, match=r"'classifier' failed on images \[2, 3, 16, 16\].*number of channels"):
        extract(FeatureClassifier(in_channels=1).eval(), torch.rand(2, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"must return \[N, D\] features.*returned \[2, 1, 4, 4\] for 2 images"):
        extract(nn.Identity(), images(2, 0))


def test_inception_without_torch_fidelity_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ConfigError, match=r"pip install 'modiff\[fidelity\]'"):
        load_feature_network("inception")
