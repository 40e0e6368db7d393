"""``modiff train``: a few steps of a tiny teacher and of its classifier, stopped, continued, exported; wrong data."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modiff.errors import ConfigError
from modiff.lit.data.images import ImageDataModule
from modiff.lit.modules.teacher import LitClassifier, LitTeacher
from modiff.metrics.features import load_feature_network
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.zoo import TeacherSpec, load_teacher

TEACHER = """
seed: 0
model:
  class_path: modiff.lit.modules.teacher.LitTeacher
  init_args:
    denoiser: {sample_size: 8, in_channels: 1, out_channels: 1, layers_per_block: 1, block_out_channels: [4],
      down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], norm_num_groups: 2, attention_head_dim: 4}
    schedule: {num_train_timesteps: 20}
    warmup_steps: 1
    sample_steps: 2
data: {path: DATA, image_size: 8, batch_size: 4}
ema_decay: 0.5
sample_images: 3
checkpoint_every: 1
trainer: {max_steps: 3, val_check_interval: 2, check_val_every_n_epoch: null, accelerator: cpu,
  enable_progress_bar: false, limit_val_batches: 1, log_every_n_steps: 1}
"""

CLASSIFIER = """
seed: 0
model:
  class_path: modiff.lit.modules.teacher.LitClassifier
  init_args: {num_features: 4, name: tiny-classifier}
data: {path: DATA, image_size: 8, batch_size: 4}
ema_decay: null
sample_images: 0
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
"""


def save_split(folder: Path, split: str, count: int, size: int = 6, column: str = "image") -> None:
    """Write one parquet file in the schema of the hub's data sets."""
    import datasets

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {column: pictures, "label": [i % 10 for i in range(count)]}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-0.parquet"))


@pytest.fixture(scope="session")
def parquet(tmp_path_factory) -> Path:
    """12 training and 4 test images of 6x6 pixels."""
    folder = tmp_path_factory.mktemp("data")
    save_split(folder, "train", 12)
    save_split(folder, "test", 4)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """The cache of ``datasets`` stays out of the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def recipe(folder: Path, text: str, data: Path) -> Path:
    path = folder / "train.yaml"
    path.write_text(text.replace("DATA", str(data)))
    return path


def test_teacher_is_trained_stopped_continued_and_exported(modiff, parquet, tmp_path, monkeypatch) -> None:
    config, out = recipe(tmp_path, TEACHER, parquet), tmp_path / "out"
    args = ("train", "--config", config, "--output", out)
    step, steps = LitTeacher.training_step, []

    def stop(self, batch):
        steps.append(self.trainer.global_step)
        if steps == [0, 1]:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(LitTeacher, "training_step", stop)
    status, _, err = modiff(*args)
    assert status == 130
    assert "the same command goes on" in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert (out / "checkpoints" / "last.ckpt").is_file()
    assert not (out / "export").exists()

    status, said, err = modiff(*args)
    assert status == 0, err
    assert steps == [0, 1, 1, 2]
    assert f"exported to {out / 'export'}" in said
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert (out / "samples" / "step_000002.png").is_file()
    with Image.open(out / "samples" / "step_000002.png") as grid:
        assert grid.size[0] > 3 * 8

    # The averaged weights are exported, and the raw ones kept beside them.
    first = load_teacher(TeacherSpec(path=str(out / "export"))).denoiser.state_dict()
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)
    averaged = {k.removeprefix("denoiser."): v for k, v in saved["state_dict"].items()}
    raw = {k.removeprefix("denoiser."): v for k, v in saved["current_model_state"].items() if "denoiser." in k}
    assert all(torch.equal(first[name], averaged[name]) for name in first)
    assert raw
    assert not all(torch.equal(first[name], raw[name]) for name in raw if name in first)

    status, _, err = modiff(*args, "--trainer.max_steps", "5")
    assert status == 0, err
    assert steps == [0, 1, 1, 2, 3, 4]
    longer = load_teacher(TeacherSpec(path=str(out / "export")))
    assert longer.sample_shape == (1, 8, 8)
    assert not torch.equal(longer.denoiser.conv_in.weight, first["conv_in.weight"])


def test_finished_training_repeated_exports_the_same_weights(modiff, parquet, tmp_path) -> None:
    args = ("train", "--config", recipe(tmp_path, TEACHER, parquet), "--output", tmp_path / "out")
    exported = []
    for _ in range(2):  # a stop behind the last step leaves the same state as a finished training
        assert modiff(*args)[0] == 0
        exported.append(next((tmp_path / "out" / "export").rglob("*.safetensors")).read_bytes())
    assert exported[0] == exported[1]


@pytest.mark.parametrize(
    "options", [("--trainer.max_steps", "5"), ("--trainer.max_epochs", "2")], ids=["steps", "epochs"]
)
@pytest.mark.parametrize("kind", ["teacher", "classifier"])
def test_training_stopped_by_a_signal_goes_on_bit_for_bit(
    modiff, parquet, tmp_path, monkeypatch, kind, options
) -> None:
    text, module = {"teacher": (TEACHER, LitTeacher), "classifier": (CLASSIFIER, LitClassifier)}[kind]
    text = text.replace("max_steps: 3, ", "").replace("max_steps: 2, ", "").replace("checkpoint_every: 1", "")
    args = ("train", "--config", recipe(tmp_path, text, parquet), *options, "--data.horizontal_flips", "true")
    status, _, err = modiff(*args, "--output", tmp_path / "whole")
    assert status == 0, err
    step = module.training_step

    def stop(self, batch):
        if self.trainer.global_step == 3:  # the first batch of the second epoch
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", stop)
        status, _, err = modiff(*args, "--output", tmp_path / "part")
    assert status == 75
    assert "interrupted by SIGUSR1; the same command goes on where this one stopped" in err
    saved = torch.load(tmp_path / "part" / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 4  # its checkpoint is of the step in which it was stopped
    status, _, err = modiff(*args, "--output", tmp_path / "part")
    assert status == 0, err
    for pattern in ("export/**/*.safetensors", "checkpoints/last.ckpt"):
        whole, part = (next((tmp_path / name).glob(pattern)) for name in ("whole", "part"))
        if pattern.endswith("safetensors"):
            assert whole.read_bytes() == part.read_bytes()
            continue
        states = [torch.load(path, weights_only=False) for path in (whole, part)]
        for key in ("state_dict", "optimizer_states", "random_states"):
            assert str(states[0][key]) == str(states[1][key])


def test_a_training_killed_after_it_went_on_goes_on_from_its_newest_checkpoint(
    modiff, parquet, tmp_path, monkeypatch
) -> None:
    """The checkpoint of a stop and the later ones of every few steps are one file."""
    text = TEACHER.replace("checkpoint_every: 1", "checkpoint_every: 5")
    args = ("train", "--config", recipe(tmp_path, text, parquet), "--output", tmp_path / "out")
    args = (*args, "--trainer.max_steps", "7")
    step = LitTeacher.training_step

    def stop(self, batch):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LitTeacher, "training_step", stop)
        assert modiff(*args)[0] == 75

    def die(self, batch):
        if self.trainer.global_step == 6:
            raise RuntimeError("a power cut")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LitTeacher, "training_step", die)
        with pytest.raises(RuntimeError, match="a power cut"):
            modiff(*args)
    checkpoints = list((tmp_path / "out" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["last.ckpt"]
    assert torch.load(checkpoints[0], weights_only=False)["global_step"] == 5


def test_other_training_in_the_same_directory_is_refused(modiff, parquet, tmp_path) -> None:
    config, out = recipe(tmp_path, CLASSIFIER, parquet), tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"name": "other", "hash": "x", "status": "complete"}))
    status, _, err = modiff("train", "--config", config, "--output", out)
    assert status == 1
    assert "holds another run (other): add --overwrite true to replace it" in err


def test_classifier_is_trained_and_exported(modiff, parquet, tmp_path) -> None:
    config, out = recipe(tmp_path, CLASSIFIER, parquet), tmp_path / "out"
    status, _, err = modiff("train", "--config", config, "--output", out)
    assert status == 0, err
    network = load_feature_network(out / "export" / "features.safetensors")
    statistics = FeatureStatistics.load(out / "export" / "feature_statistics.safetensors")
    statistics.check(network.name, network.num_features)
    assert (network.name, statistics.num_images) == ("tiny-classifier", 12)
    images = ImageDataModule(path=str(parquet), image_size=8)
    images.setup()
    with torch.no_grad():
        features = network(images.train_set.__getitems__(list(range(12)))["image"])
    assert torch.allclose(statistics.mean.double(), features.double().mean(dim=0), atol=1e-5)


def test_images_are_centred_on_black(parquet) -> None:
    data = ImageDataModule(path=str(parquet), image_size=8, limit_train=5)
    data.setup()
    batch = data.train_set.__getitems__([0, 1])
    assert len(data.train_set) == 5
    assert batch["image"].shape == (2, 1, 8, 8)
    border = batch["image"].clone()
    border[:, :, 1:7, 1:7] = 0
    assert not border.any()
    assert batch["image"].max() <= 1
    assert batch["label"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.path", "nowhere"], "data.path 'nowhere' does not exist. Give a folder with parquet files or images"),
        (["--data.channels", "2"], "data.channels is 2; allowed are 1 (grey) and 3 (RGB)"),
        (["--data.image_size", "4"], "larger than data.image_size 4"),
        (["--data.batch_size", "0"], "data.batch_size is 0; allowed are whole numbers, 1 or more"),
        (["--model.learning_rat", "0"], "learning_rat"),
        (["--data.batch_size", "50"], "data.batch_size is 50, but there are only 12 training images"),
        (["--ckpt", "nowhere.ckpt"], "--ckpt nowhere.ckpt does not exist"),
    ],
)
def test_wrong_option_writes_nothing(modiff, parquet, tmp_path, options, message) -> None:
    config = recipe(tmp_path, TEACHER, parquet)
    status, _, err = modiff("train", "--config", config, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_columns(tmp_path) -> None:
    save_split(tmp_path, "train", 2, column="picture")
    save_split(tmp_path, "test", 2, column="picture")
    with pytest.raises(
        ConfigError, match=r"has the columns \['picture', 'label'\]; needed are image \(or img\) and label"
    ):
        ImageDataModule(path=str(tmp_path), image_size=8).setup()


def test_missing_split(tmp_path) -> None:
    save_split(tmp_path, "train", 2)
    with pytest.raises(
        ConfigError, match=r"holds neither train\*.parquet and test\*.parquet nor train/ and test/ folders"
    ):
        ImageDataModule(path=str(tmp_path), image_size=8).setup()


def test_hub_without_that_split(monkeypatch) -> None:
    data = ImageDataModule(image_size=8)
    monkeypatch.setattr(data, "_load_from_hub", lambda: {"train": None, "validation": None})
    with pytest.raises(ConfigError, match="has the splits train, validation; needed are train and test"):
        data.setup()


def test_damaged_parquet(tmp_path, parquet) -> None:
    for file in parquet.glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"data.path .* cannot be read .*Copy the files again"):
        ImageDataModule(path=str(tmp_path), image_size=8).setup()


def test_image_folder(tmp_path) -> None:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (8, 8), 255).save(tmp_path / split / label / "1.png")
    data = ImageDataModule(path=str(tmp_path), image_size=8, channels=3)
    data.setup()
    assert data.train_set.images.shape == (2, 3, 8, 8)
    assert data.train_set.labels.tolist() == [0, 1]


def test_hub_out_of_reach_fails_fast_and_names_the_fix(monkeypatch) -> None:
    import datasets
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConfigError, match=r"'some/set' is neither on the hub .*\(ConnectionError\).* --data.path FOLDER"
    ):
        ImageDataModule(name="some/set").setup()
