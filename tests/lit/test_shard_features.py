"""Features of shards are measured once, kept beside them, and measured again where something changed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from modiff.lit.modules.student import to_unit_range
from modiff.lit.runs import shard_features
from modiff.lit.runs.shard_features import ShardFeatures
from modiff.lit.runs.shards import ShardStore
from modiff.metrics.feature_outputs import FeatureOutputs
from modiff.metrics.features import load_feature_network
from modiff.metrics.fidelity import ImageFidelity

OPTIONS = ("--timing_rounds", "0", "--error_images", "0", "--num_images", "20")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, recipe_text) -> Path:
    """Shards of 8, 8 and 4 images in batches of 4, and their recipe."""
    from modiff.lit.cli.main import main

    folder = tmp_path_factory.mktemp("drawn")
    (folder / "tiny.yaml").write_text(recipe_text)
    args = ["evaluate", "--config", str(folder / "tiny.yaml"), *OPTIONS, "--shards", "tar", "--shard_images", "8"]
    assert main([*args, "--output", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def shards(drawn, tmp_path) -> Path:
    shutil.copytree(drawn / "out" / "shards", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Images of every pass of the network over shards."""
    found: list[int] = []
    extract = shard_features.extract

    def counted(network, images) -> FeatureOutputs:
        found.append(len(images))
        return extract(network, images)

    monkeypatch.setattr(shard_features, "extract", counted)
    return found


def figures(modiff, drawn: Path, shards: Path, output: Path, code: int = 0) -> dict:
    args = ("evaluate", "--config", drawn / "tiny.yaml", *OPTIONS, "--from-images", shards, "--output", output)
    status, _, err = modiff(*args)
    assert status == code, err
    return json.loads((output / "metrics.json").read_text()) if code == 0 else {}


def plain(shards: Path, features: Path) -> dict:
    """The same figures from the images themselves."""
    store, metric = ShardStore(shards, 4), ImageFidelity(load_feature_network(features))
    for first in range(0, 20, 4):
        for who, images in store.images(first, first + 4).items():
            metric.update(to_unit_range(images), who, torch.arange(first, first + 4))
    return metric.compute()


def test_features_are_measured_once_and_again_where_a_shard_changed(
    modiff, drawn, shards, passes, tmp_path, tiny_features
) -> None:
    first = figures(modiff, drawn, shards, tmp_path / "first")
    assert passes == [4] * 2 * 5
    expected = plain(shards, tiny_features)
    keys = ("fid_to_teacher", "inception_score", "precision_to_teacher", "recall_to_teacher")
    assert {key: first["student"][key] for key in keys} == {key: expected["student"][key] for key in keys}
    kept = sorted(path.name for path in shards.glob("*.safetensors"))
    assert [name[:27] for name in kept] == [f"shard-00000{i}.tiny-features-" for i in range(3)]
    passes.clear()
    second = figures(modiff, drawn, shards, tmp_path / "second")
    assert passes == []
    assert (second["student"], second["teacher"]) == (first["student"], first["teacher"])
    shutil.copy(shards / "shard-000000.tar", shards / "shard-000001.tar")  # other images under its name
    third = figures(modiff, drawn, shards, tmp_path / "third")
    assert passes == [4] * 2 * 2
    assert third["student"]["fid_to_teacher"] == plain(shards, tiny_features)["student"]["fid_to_teacher"]
    assert third["student"]["fid_to_teacher"] != first["student"]["fid_to_teacher"]


def test_a_stopped_run_goes_on_with_the_next_shard(modiff, drawn, shards, passes, tmp_path, monkeypatch) -> None:
    extract = shard_features.extract

    def disturbed(network, images) -> FeatureOutputs:
        if len(passes) == 5:  # in the second shard
            os.kill(os.getpid(), signal.SIGTERM)
        return extract(network, images)

    with monkeypatch.context() as patch:
        patch.setattr(shard_features, "extract", disturbed)
        figures(modiff, drawn, shards, tmp_path / "out", code=130)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "interrupted"
    assert len(list(shards.glob("*.safetensors"))) == 1
    passes.clear()
    figures(modiff, drawn, shards, tmp_path / "out")
    assert passes == [4] * 2 * 3


def test_ranks_share_the_shards_and_another_network_or_batch_is_another_measurement(
    shards, passes, tmp_path, tiny_features
) -> None:
    network = load_feature_network(tiny_features)

    def features(batch: int = 4, identity: str = "a" * 64, otherwise: Path = tmp_path) -> ShardFeatures:
        return ShardFeatures(ShardStore(shards, batch), network, identity, torch.device("cpu"), otherwise)

    assert [features().measure(20, rank, 2) for rank in range(2)] == [2, 1]
    assert features().measure(20) == 0
    assert features(batch=2).measure(8) == 1  # the first shard holds them
    assert features(identity="b" * 64).measure(20) == 3
    path = features(identity="b" * 64).path(2)
    path.write_bytes(path.read_bytes()[:-4])  # a damaged file is measured again
    assert features(identity="b" * 64).measure(20) == 1
    found = features(identity="b" * 64).of("student", [17, 3])
    images = to_unit_range(ShardStore(shards, 4).images(0, 20)["student"])
    assert torch.allclose(found.features, network(images[[17, 3]]), atol=1e-6)
    assert found.logits.shape == (2, 10)


def test_features_of_shards_that_cannot_be_written_beside_go_elsewhere(
    shards, tmp_path, tiny_features, monkeypatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    network = load_feature_network(tiny_features)
    found = ShardFeatures(ShardStore(shards, 4), network, "a" * 64, torch.device("cpu"), tmp_path / "features")
    assert found.measure(20) == 3
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3
    assert not list(shards.glob("*.safetensors"))
