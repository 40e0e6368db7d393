"""Every recipe is parsed and built by its command; presets are what their files are called; invariant 5."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from small_models import tiny_unet

import modiff
from modiff.config.quant import QuantConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FOLDER = Path(__file__).parents[2] / "recipes"
OTHERS = ("sweeps", "trainer", "kubernetes")  # grids over recipes, overlays, and manifests
FILES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name not in OTHERS)
SEARCHES = [path for path in FILES if path.stem == "search"]
RECIPES = [path for path in FILES if path not in SEARCHES]
TRAINED = [path for path in RECIPES if "class_path" in yaml.safe_load(path.read_text())["model"]]
ALL_DRAWN = [path for path in RECIPES if path not in TRAINED]
# Of the paper's rows, which are generated and checked one by one elsewhere, the first of each teacher.
GENERATED = {path.parent for path in ALL_DRAWN if path.parent.name not in ("mnist", "cifar10", "bench")}
DRAWN = [p for p in ALL_DRAWN if p.parent not in GENERATED or p == min(p.parent.glob("w*.yaml"))]
IDS = {"ids": lambda path: str(path.relative_to(FOLDER))}


def build(path: Path, *options: str):
    """The parsed and built command of a recipe of images."""
    from modiff.lit.cli.student import StudentCLI

    return StudentCLI("evaluate", ["--config", str(path), *options])


def test_all_recipes_of_the_first_release_are_there() -> None:
    names = {path.stem for path in (FOLDER / "mnist").glob("*.yaml")}
    assert names >= {
        *("teacher", "w8a8_ptq", "w8a8_modiff", "w8a4_ptq", "w8a4_modiff", "w8a3_modiff", "w8a2_modiff"),
        *("w4a4_ptq", "w4a4_modiff", "w8a4_modiff_no_compensation"),
    }


@pytest.mark.parametrize("path", SEARCHES, **IDS)
def test_search_recipes_parse_and_their_schedules_exist(path) -> None:
    from modiff.lit.commands.search import make_parser
    from modiff.lit.search.space import SearchSpace

    options = make_parser().parse_args(["--config", str(path), "--budget", "1m"])
    space = SearchSpace(**options.space.as_dict())
    assert options.budget == "1m"
    assert set(space.steps) == set(yaml.safe_load(path.read_text())["space"]["steps"])


@pytest.mark.parametrize("path", FILES, **IDS)
def test_recipe_is_flat_and_commented(path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    command = "modiff bench" if path.parent.name == "bench" else "--config"
    assert f"{command} recipes/{path.relative_to(FOLDER)}" in text
    assert "defaults:" not in text


@pytest.mark.parametrize("path", DRAWN, **IDS)
def test_recipe_is_built_by_evaluate(path) -> None:
    cli = build(path)
    assert cli.model.config is not None
    assert cli.num_images >= 64
    assert cli.recipe == str(path.relative_to(FOLDER).with_suffix(""))


@pytest.mark.parametrize("path", TRAINED, **IDS)
def test_recipe_is_built_by_train(path) -> None:
    from modiff.lit.commands.train import make_cli

    cli = make_cli(["--config", str(path)])
    assert type(cli.model).__name__ in ("LitTeacher", "LitClassifier")
    parameters = sum(p.numel() for p in cli.model.parameters())
    limits = {"mnist": 2_000_000, "teacher_tiny": 4_000_000, "teacher_small": 6_000_000, "teacher": 35_746_307}
    assert parameters <= limits["mnist" if path.parent.name == "mnist" else path.stem]


@pytest.mark.parametrize("name", ["teacher", "classifier"])
def test_recipe_with_the_class_paths_of_the_first_release_is_built(tmp_path, name) -> None:
    from modiff.lit.commands.train import make_cli

    path, old = FOLDER / "mnist" / f"{name}.yaml", tmp_path / "old.yaml"
    old.write_text(path.read_text().replace("modiff.lit.modules.teacher.", "modiff.lit.teacher."))
    assert old.read_text() != path.read_text()
    assert type(make_cli(["--config", str(old)]).model) is type(make_cli(["--config", str(path)]).model)


@pytest.mark.parametrize(
    "path", [p for p in DRAWN if p.parent.name == "mnist" and re.fullmatch("w.a._(ptq|modiff)", p.stem)], **IDS
)
def test_preset_is_the_one_in_the_name(path) -> None:
    assert build(path).model.config == QuantConfig.preset(path.stem.replace("_", "-"))


@pytest.mark.parametrize("bits", ["w4a8", "w4a4", "w4a3"])
def test_calibrated_recipes_are_what_they_are_called(bits) -> None:
    found = {
        kind: build(FOLDER / "mnist" / f"{bits}_{kind}.yaml").model
        for kind in ("qdiffusion", "qdiffusion_modiff", "gptq_modiff")
    }
    modulated = QuantConfig.preset(f"{bits}-modiff")
    assert found["qdiffusion_modiff"].config == found["gptq_modiff"].config == modulated
    plain, preset = found["qdiffusion"].config, QuantConfig.preset(f"{bits}-ptq")
    assert plain.modulation is None
    assert (plain.weight, plain.rules) == (preset.weight, preset.rules)
    assert (plain.vectors, plain.ends) == (preset.vectors, preset.ends)
    assert (plain.activation.bits, plain.activation.symmetric) == (preset.activation.bits, preset.activation.symmetric)
    assert (plain.activation.range, plain.activation.granularity) == ("calibrated", "tensor")
    assert {kind: model.calibration.method for kind, model in found.items()} == {
        "qdiffusion": "brecq",
        "qdiffusion_modiff": "brecq",
        "gptq_modiff": "gptq",
    }
    assert len({(model.calibration.num_images, model.calibration.seed) for model in found.values()}) == 1


@pytest.mark.parametrize(
    "kind", ["qdiffusion", "gptq_modiff", pytest.param("qdiffusion_modiff", marks=pytest.mark.slow)]
)
def test_calibrated_recipe_runs_on_a_tiny_teacher(kind, tiny_teacher, tmp_path, monkeypatch, capsys) -> None:
    from modiff.lit.cli.main import main

    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    options = [
        "--model.teacher.path",
        tiny_teacher,
        "--model.steps",
        "3",
        "--num_images",
        "2",
        "--data.batch_size",
        "2",
    ]
    options += ["--timing_rounds", "0", "--error_images", "0", "--wandb", "disabled"]
    options += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    few = {"num_images": 4, "images_per_batch": 2, "samples": 4, "iterations": 2, "tuning_iterations": 2, "bins": 64}
    few |= {"evaluations": 2, "positions": 60}
    options += [part for name, value in few.items() for part in (f"--model.calibration.{name}", value)]
    recipe, out = FOLDER / "mnist" / f"w4a4_{kind}.yaml", tmp_path / "out"
    assert main(["evaluate", "--config", str(recipe), *map(str, options), "--output", str(out)]) == 0
    assert "once; kept in" in capsys.readouterr().out
    assert (out / "metrics.json").is_file()


@pytest.mark.parametrize("name", ["ddpm_cifar10", "dit_s"])
def test_bench_recipes_are_of_known_size_and_differ_in_the_backend_only(name) -> None:
    from modiff.teachers.zoo import load_teacher

    auto, simulated = (build(FOLDER / "bench" / f"{name}_w8a7{end}.yaml") for end in ("", "_simulated"))
    config = auto.model.config
    assert (config.weight.bits, config.activation.bits, config.activation.symmetric) == (8, 7, True)
    assert (config.activation.granularity, config.backend) == ("sample", "auto")
    assert dataclasses.replace(config, backend="simulate") == simulated.model.config
    assert auto.model.spec == simulated.model.spec
    parameters = sum(p.numel() for p in load_teacher(auto.model.spec).denoiser.parameters())
    assert parameters == {"ddpm_cifar10": 35_746_307, "dit_s": 39_805_088}[name]


def test_ablation_differs_in_compensation_only() -> None:
    ablation = build(FOLDER / "mnist" / "w8a4_modiff_no_compensation.yaml").model.config
    full = build(FOLDER / "mnist" / "w8a4_modiff.yaml").model.config
    assert not ablation.modulation.error_compensation
    assert (ablation.weight, ablation.activation, ablation.rules) == (full.weight, full.activation, full.rules)
    assert full.modulation == modiff.Modulation()


@pytest.mark.parametrize("bits", ["w8a8", "w8a4", "w4a4"])
def test_invariant_5_both_arms_quantize_the_same_operators_at_the_same_bits(bits) -> None:
    rows = {}
    for arm in ("ptq", "modiff"):
        cli = build(FOLDER / "mnist" / f"{bits}_{arm}.yaml")
        student = modiff.quantize(tiny_unet(), cli.model.config)
        rows[arm] = [
            (row.name, row.special, row.weight and row.weight.bits, row.activation and row.activation.bits, row.skipped)
            for row in modiff.describe(student)
        ]
    assert rows["ptq"] == rows["modiff"]
    named = (int(bits[1]), int(bits[3]))
    assert all(row[2:4] == ((8, 8) if row[1] else named) for row in rows["ptq"])
    assert {row[1] for row in rows["ptq"]} == ({""} if bits == "w8a8" else {"", "vector", "end"})


@pytest.mark.parametrize("path", DRAWN, **IDS)
def test_dumped_recipe_is_the_same_recipe(path, tmp_path) -> None:
    cli = build(path)
    saved = tmp_path / "saved.yaml"
    saved.write_text(cli.dump())
    again = build(saved)
    assert again.model.config == cli.model.config
    assert again.identity() == cli.identity()
    assert again.dump() == cli.dump()
    values = yaml.safe_load(saved.read_text())
    assert values["model"]["config"]["activation"]["group_size"] is None
    assert "preset" in values["model"]
    assert values["model"]["preset"] is None


def test_script_for_launchers_is_the_command(capsys) -> None:
    import runpy

    assert runpy.run_path(str(FOLDER / "run.py"))["main"] is __import__("modiff.lit.cli.main", fromlist=["main"]).main


def test_a_recipe_may_take_scales_from_the_evaluation_before(tmp_path) -> None:
    recipe = yaml.safe_load((FOLDER / "mnist" / "w8a8_modiff.yaml").read_text())
    del recipe["model"]["preset"]
    activation = {"bits": 6, "granularity": "sample", "range": "previous"}
    recipe["model"]["config"] = {"weight": {"bits": 8, "granularity": "channel"}, "activation": activation}
    recipe["model"]["config"]["modulation"] = {"reconstruction_dtype": "int16"}
    path = tmp_path / "previous.yaml"
    path.write_text(yaml.safe_dump(recipe))
    config = build(path).model.config
    assert config.activation == modiff.QuantSpec(6, "sample", range="previous")
    assert config.modulation == modiff.Modulation(reconstruction_dtype="int16")
    rows = list(modiff.describe(modiff.quantize(tiny_unet(), config)))
    assert {row.activation.range for row in rows if not row.skipped} == {"previous"}
    saved = tmp_path / "saved.yaml"
    saved.write_text(build(path).dump())
    assert build(saved).model.config == config
