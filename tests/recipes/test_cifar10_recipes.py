"""Every CIFAR-10 recipe parses, builds and is what its name says; the generated ones are up to date."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from modiff.config.quant import Modulation
from modiff.lit.commands.evaluate import StudentCLI
from modiff.lit.modules.student import LitStudent

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_cifar10_recipes  # noqa: E402

FOLDER = ROOT / "recipes" / "cifar10"
COMPARISONS = sorted(FOLDER.glob("w*.yaml"))


@pytest.fixture(scope="module")
def built() -> dict[str, LitStudent]:
    """What each comparison recipe builds, by name; one parser reads them all, because making one takes most time."""
    cli = StudentCLI("evaluate", ["--config", str(COMPARISONS[0])])
    modules = {}
    for path in COMPARISONS:
        cli.parser.set_defaults({"model.config": None, "model.calibration": None})  # else the last one's
        with warnings.catch_warnings():  # the CLI silences it itself when it is made
            warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
            cli.parse_arguments(cli.parser, ["--config", str(path)])
        cli.instantiate_classes()
        modules[path.stem] = cli.model
    return modules


def test_the_generated_recipes_are_the_shipped_ones() -> None:
    generated = {row.name: make_cifar10_recipes.recipe(row) for row in make_cifar10_recipes.rows()}
    assert {path.stem: path.read_text() for path in COMPARISONS} == generated
    assert len(generated) == 36


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_recipe_builds_what_its_name_says(path: Path, built) -> None:
    module = built[path.stem]
    bits, _, arm = path.stem.partition("_")
    config = module.config
    assert f"w{config.weight.bits}a{config.activation.bits}" == bits
    expected = {
        "ptq": (None, "sample"),
        "modiff": (Modulation(), "sample"),
        "modiff_no_compensation": (Modulation(error_compensation=False), "sample"),
        "modiff_tensor": (Modulation(), "tensor"),
        "modiff_channel": (Modulation(), "channel"),
        "modiff_sample_channel": (Modulation(), "sample_channel"),
    }
    assert (config.modulation, config.activation.granularity) == expected[arm]
    assert (module.scheduler_name, module.steps) == ("ddim_quadratic", 100)
    method = None if module.calibration is None else module.calibration.method
    assert method == {8: None, 4: "gptq"}[config.weight.bits]


def test_arms_of_the_same_bits_differ_in_the_arm_only(built) -> None:
    configs = {name: module.config for name, module in built.items()}
    for name, config in configs.items():
        if name.endswith("_modiff"):
            ablation = configs[f"{name}_no_compensation"]
            assert (ablation.weight, ablation.activation) == (config.weight, config.activation)
            assert built[f"{name}_no_compensation"].calibration == built[name].calibration
            plain = built[name.replace("_modiff", "_ptq")]
            assert (plain.config.weight, plain.calibration) == (config.weight, built[name].calibration)


@pytest.mark.parametrize(("name", "millions"), [("teacher_small", 5.6), ("teacher", 35.7)])
def test_a_teacher_recipe_builds_a_network_of_its_size(name: str, millions: float) -> None:
    from lightning.pytorch import LightningModule

    from modiff.lit.commands.train import TrainCLI
    from modiff.lit.data.images import ImageDataModule

    with torch.random.fork_rng(devices=[]):
        args = ["--config", str(FOLDER / f"{name}.yaml"), "--trainer.precision", "32-true"]
        cli = TrainCLI(
            "train", args, model_class=LightningModule, datamodule_class=ImageDataModule, subclass_mode_model=True
        )
    count = sum(p.numel() for p in cli.model.denoiser.parameters())
    assert round(count / 1e6, 1) == millions
    assert cli.model.scheduler.config.clip_sample is False  # the quadratic protocol does not clip
    assert cli.model.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert cli.datamodule.on_device
    assert cli.datamodule.horizontal_flips
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert values["trainer"]["precision"] == "bf16-mixed"
    assert cli.model.use_compile
    assert 0.99 < values["ema_decay"] < 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_gives_its_own_command(path: Path) -> None:
    head = path.read_text().split("seed:")[0]
    assert f"--config recipes/cifar10/{path.name}" in head
    assert isinstance(yaml.safe_load(path.read_text()), dict)
