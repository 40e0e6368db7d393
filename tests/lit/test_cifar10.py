"""Training on images that lie on the device, and the CIFAR-10 benchmark, both on tiny sizes."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from modiff.compiling.probe import compiler_problem
from modiff.errors import ConfigError
from modiff.lit.data.batches import DeviceBatches, ImageDataset, flip
from modiff.lit.modules.teacher import LitTeacher

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

TINY = {
    "denoiser": {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    },
    "sample_steps": 2,
    "warmup_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 8 test images of 8x8, in the columns of the hub's uoft-cs/cifar10."""
    import datasets
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    datasets.disable_progress_bars()
    for split, count in (("train", 16), ("test", 8)):
        images = [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
        columns = {"img": images, "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def rgb_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modiff.metrics.features import FeatureClassifier

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("rgb") / "tiny.safetensors"
    FeatureClassifier(3, width=4, num_features=4, name="tiny-rgb").save(path)
    return path


@pytest.fixture(scope="module")
def reference(data: Path, rgb_features: Path) -> Path:
    from modiff.lit.cli.main import main

    path = rgb_features.parent / "reference.safetensors"
    args = ["statistics", "--features", rgb_features, "--output", path, "--device", "cpu"]
    args += ["--data.path", data, "--data.channels", "3", "--data.image_size", "8", "--data.batch_size", "5"]
    assert main([str(arg) for arg in args]) == 0
    return path


@pytest.fixture
def recipe(tmp_path: Path, data: Path) -> Path:
    """The shipped recipe of the small teacher, on a tiny network and tiny images."""
    import yaml

    values = yaml.safe_load((ROOT / "recipes/cifar10/teacher_small.yaml").read_text())
    denoiser = {**values["model"]["init_args"]["denoiser"], **TINY["denoiser"]}
    values["model"]["init_args"].update({**TINY, "denoiser": denoiser, "compile": False})
    values["data"].update({"path": str(data), "image_size": 8, "batch_size": 4})
    values["ema_every"] = 1
    values["checkpoint_every"] = 1
    values["sample_images"] = 2
    values["trainer"].update(
        {"max_steps": 6, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1, "accelerator": "cpu"}
    )
    values["trainer"].update({"precision": "32-true", "enable_progress_bar": False, "num_sanity_val_steps": 0})
    path = tmp_path / "tiny_teacher.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def dataset(count: int = 10, flips: bool = False) -> ImageDataset:
    images = torch.arange(count * 3 * 2 * 2, dtype=torch.uint8).reshape(count, 3, 2, 2)
    return ImageDataset(images, torch.arange(count), flips)


def weights(folder: Path) -> bytes:
    return (folder / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


# Batches on the device


def test_an_epoch_shows_every_image_once_and_the_next_one_in_another_order() -> None:
    batches = DeviceBatches(dataset(), 3, "cpu", shuffle=True)
    first, second = (torch.cat([b["label"] for b in batches]).tolist() for _ in range(2))
    assert len(batches) == 3
    assert len(set(first)) == len(first) == 9
    assert first != second
    assert len(set(second)) == 9


def test_batches_hold_the_images_of_their_labels_as_floats() -> None:
    source = dataset()
    for batch in DeviceBatches(source, 4, "cpu", shuffle=True):
        assert torch.equal(batch["image"], source.images[batch["label"]].float() / 255)


def test_test_batches_are_in_order_whole_and_never_mirrored() -> None:
    source = dataset(flips=True)
    batches = DeviceBatches(source, 4, "cpu", shuffle=False)
    for _ in range(2):
        found = list(batches)
        assert [len(b["label"]) for b in found] == [4, 4, 2]
        assert torch.equal(torch.cat([b["image"] for b in found]), source.images.float() / 255)


def test_flips_mirror_about_half_of_the_images_and_only_left_to_right() -> None:
    source = ImageDataset(torch.randint(0, 256, (200, 3, 2, 4), dtype=torch.uint8), torch.arange(200), flips=True)
    mirrored = 0
    for batch in DeviceBatches(source, 50, "cpu", shuffle=True):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            original = source.images[label].float() / 255
            kept, flipped = torch.equal(image, original), torch.equal(image, original.flip(-1))
            assert kept or flipped
            mirrored += flipped
    assert 60 < mirrored < 140  # 5.7 standard deviations around 100


def test_flip_leaves_the_others_alone() -> None:
    images = torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8)
    out = flip(images, torch.tensor([True, False, True]))
    assert out.dtype == torch.uint8
    assert torch.equal(out[1], images[1])
    assert torch.equal(out[[0, 2]], images[[0, 2]].flip(-1))


def test_flips_without_a_device_are_drawn_in_the_data_set() -> None:
    torch.manual_seed(0)
    source = ImageDataset(torch.randint(0, 256, (64, 3, 2, 2), dtype=torch.uint8), torch.arange(64), flips=True)
    out = source.__getitems__(list(range(64)))["image"]
    original = source.images.float() / 255
    kept = (out == original).flatten(1).all(dim=1)
    assert 10 < int(kept.sum()) < 54
    assert torch.equal(out[~kept], original[~kept].flip(-1))


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = [DeviceBatches(dataset(12), 2, "cpu", True, seed=5, world_size=3, rank=r) for r in range(3)]
    labels = [label for rank in ranks for batch in rank for label in batch["label"].tolist()]
    assert sorted(labels) == list(range(12))


def test_batches_go_on_where_a_checkpoint_left_off_and_leave_the_global_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    whole = DeviceBatches(dataset(flips=True), 2, "cpu", shuffle=True)
    expected = [b["image"] for _ in range(2) for b in whole]
    interrupted = DeviceBatches(dataset(flips=True), 2, "cpu", shuffle=True)
    iterator = iter(interrupted)
    seen = [next(iterator)["image"] for _ in range(3)]
    resumed = DeviceBatches(dataset(flips=True), 2, "cpu", shuffle=True)
    resumed.load_state_dict(interrupted.state_dict())
    seen += [b["image"] for _ in range(2) for b in resumed]
    assert len(seen) == len(expected) == 10
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_another_batch_size_starts_its_epoch_again() -> None:
    batches = DeviceBatches(dataset(), 2, "cpu", shuffle=True)
    batches.load_state_dict({"epoch": 3, "position": 4, "images": 10, "batch": 1})
    assert (batches.epoch, batches.position) == (3, 0)


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.batch_size is 11 on 1 device\(s\), but there are 10 training images"):
        DeviceBatches(dataset(), 11, "cpu", shuffle=True)


# Statistics of real images


def test_statistics_are_those_of_the_features_themselves(data, rgb_features, reference) -> None:
    from modiff.lit.data.images import ImageDataModule
    from modiff.metrics.features import load_feature_network
    from modiff.metrics.statistics import FeatureStatistics

    module = ImageDataModule(path=str(data), image_size=8, channels=3)
    module.setup()
    with torch.no_grad():
        features = load_feature_network(rgb_features)(module.train_set.images.float() / 255)
    expected, found = FeatureStatistics.from_features(features), FeatureStatistics.load(reference)
    assert (found.num_images, found.network) == (16, "tiny-rgb")
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-7)  # float32 batches of another size
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.npz"], "--output x.npz must end in .safetensors"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["--features", "nowhere.pt"], "Feature network nowhere.pt does not exist"),
        (["--data.path", "nowhere"], "data.path 'nowhere' does not exist"),
        (["--split", "validation"], "split"),
    ],
)
def test_statistics_refuse_in_one_sentence(modiff, data, rgb_features, tmp_path, options, message) -> None:
    base = ["--features", rgb_features, "--data.path", data, "--data.channels", "3", "--data.image_size", "8"]
    status, _, err = modiff("statistics", *base, "--output", tmp_path / "out.safetensors", *options)
    assert status == 1
    assert message in err
    assert not (tmp_path / "out.safetensors").exists()


def test_statistics_do_not_replace_a_file_unasked(modiff, data, rgb_features, reference) -> None:
    base = ["--features", rgb_features, "--data.path", data, "--data.channels", "3", "--data.image_size", "8"]
    status, _, err = modiff("statistics", *base, "--output", reference)
    assert status == 1
    assert "add --overwrite true" in err


# Training


def test_the_recipe_trains_logs_its_distance_and_resumes_to_the_same_bits(
    modiff, recipe, rgb_features, reference, tmp_path
) -> None:
    distance = ["--features", rgb_features, "--reference", reference, "--distance_images", "8"]
    status, out, err = modiff("train", "--config", recipe, *distance, "--output", tmp_path / "whole")
    assert status == 0, err
    assert "exported" in out
    rows = list(csv.DictReader((tmp_path / "whole" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()))
    found = [float(row["val/frechet_tiny-rgb"]) for row in rows if row["val/frechet_tiny-rgb"]]
    assert len(found) == 3
    assert all(math.isfinite(value) and value > 0 for value in found)
    assert len(list((tmp_path / "whole" / "samples").glob("step_*.png"))) == 3
    # Without pictures and distances, and stopped after 3 of 6 steps (in the middle of an epoch of 4): the same weights.
    part = ["train", "--config", recipe, "--output", tmp_path / "part", "--sample_images", "0"]
    stop = tmp_path / "stop.yaml"
    stop.write_text("trainer:\n  callbacks:\n  - class_path: stop_training.StopAfter\n    init_args: {steps: 3}\n")
    status, _, _ = modiff(*part, "--config", stop)
    assert status == 130
    assert json.loads((tmp_path / "part" / "run.json").read_text())["status"] == "interrupted"
    status, _, err = modiff(*part)
    assert status == 0, err
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert (tmp_path / "part" / "logs" / "version_1" / "metrics.csv").is_file()
    assert (tmp_path / "part" / "logs" / "version_0" / "metrics.csv").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "x.pt"], "features and reference come together"),
        (["--ema_every", "0"], "ema_every is 0; allowed are whole numbers, 1 or more"),
    ],
)
def test_wrong_training_options_write_nothing(modiff, recipe, tmp_path, options, message) -> None:
    status, _, err = modiff("train", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_too_few_images_for_a_distance_are_refused(rgb_features, reference) -> None:
    from modiff.lit.callbacks.training_samples import TrainingDistance

    with pytest.raises(ConfigError, match="distance_images is 7, but 4 features need 8"):
        TrainingDistance(rgb_features, reference, count=7)


def test_channels_last_reaches_weights_and_images() -> None:
    module = LitTeacher({**TINY["denoiser"], "layers_per_block": 1}, channels_last=True)
    seen = []
    module.denoiser.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.loss(torch.rand(2, 3, 8, 8), torch.arange(2))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert module.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_sampling_leaves_the_random_numbers_of_training_alone() -> None:
    module = LitTeacher({**TINY["denoiser"], "layers_per_block": 1}, sample_steps=2)
    state = torch.get_rng_state()
    images = module.sample(3, seed=1)
    assert images.shape == (3, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.sample(3, seed=1), images)
    assert not torch.equal(module.sample(3, seed=2), images)


def test_training_without_a_compiler_says_so_and_goes_on(modiff, recipe, tmp_path, monkeypatch) -> None:
    def broken(function):
        def run(*_):
            raise RuntimeError("no C++ compiler found\nsecond line")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    assert compiler_problem(torch.device("cpu")) == "no C++ compiler found"
    options = ["--model.init_args.compile", "true", "--trainer.max_steps", "1", "--sample_images", "0"]
    status, out, err = modiff("train", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert "torch.compile finds no working compiler here (no C++ compiler found)" in out


def test_training_goes_through_the_compiled_denoiser_in_bf16(modiff, recipe, tmp_path, monkeypatch) -> None:
    calls, dtypes = [], []

    def compile_(function):
        def run(*args):
            calls.append(args[0].shape)
            output = function(*args)
            dtypes.append(output.dtype if isinstance(output, torch.Tensor) else output.sample.dtype)
            return output

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    options = ["--model.init_args.compile", "true", "--trainer.max_steps", "2", "--sample_images", "2"]
    options += ["--trainer.precision", "bf16-mixed"]  # the recipe's own
    status, _, err = modiff("train", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert calls == [(8,), (4, 3, 8, 8), (4, 3, 8, 8)]  # the trial, and two training steps
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    exported = safetensors.torch.load_file(tmp_path / "out" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}  # autocast: the weights stay


# The package


def test_a_trained_teacher_is_packed_in_fp16_with_a_card_measured_on_it(
    modiff, recipe, data, rgb_features, reference, tmp_path
) -> None:
    import package_cifar10

    from modiff.metrics.statistics import FeatureStatistics, frechet_distance
    from modiff.teachers.zoo import TeacherSpec, load_teacher

    run, out, test = tmp_path / "teacher_small", tmp_path / "cifar10-tiny", tmp_path / "test.safetensors"
    status, _, err = modiff("train", "--config", recipe, "--trainer.max_steps", "2", "--output", run)
    assert status == 0, err
    images = ["--data.path", data, "--data.channels", "3", "--data.image_size", "8", "--device", "cpu"]
    assert modiff("statistics", "--features", rgb_features, *images, "--split", "test", "--output", test)[0] == 0
    args = ["--run", run, "--features", rgb_features, "--reference", reference, "--test_reference", test]
    args += ["--num_images", "9", "--batch_size", "4", "--steps", "2", "--device", "cpu", "--output", out]
    with pytest.raises(SystemExit, match=r"The weights take 0.\d MiB in float16; allowed are 0.001"):
        package_cifar10.main([str(arg) for arg in (*args, "--mib", "0.001")])
    assert not list(tmp_path.glob("cifar10-tiny*"))
    assert package_cifar10.main([str(arg) for arg in args]) == 0
    packed = safetensors.torch.load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    exported = safetensors.torch.load_file(run / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(packed[name], exported[name].half()) for name in exported)
    loaded = load_teacher(TeacherSpec(path=str(out))).denoiser.state_dict()
    assert all(torch.equal(loaded[name], packed[name].float()) for name in packed)
    card = (out / "README.md").read_text()
    floor = frechet_distance(*(FeatureStatistics.load(path) for path in (test, reference)))
    assert f"| 8 test images: the floor | {floor:.3f} |" in card
    assert "this teacher, 9 images, DDIM 2 quadratic steps, seed 0" in card
    assert "| 2 steps of 4 images" in card
    assert {"loss.png", "samples.png", "model_index.json"} <= {file.name for file in out.iterdir()}
    with pytest.raises(SystemExit, match="exists; remove it, or give another --output"):
        package_cifar10.main([str(arg) for arg in args])
