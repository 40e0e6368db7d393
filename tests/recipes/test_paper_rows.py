"""Recipes of the paper's rows: written from their table, all valid, all run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import modiff
from modiff.calibration import calibrate
from modiff.config.quant import QuantConfig
from modiff.lit.callbacks.calibration import draw
from modiff.lit.cli.main import main
from modiff.lit.cli.student import StudentCLI
from modiff.lit.data.conditions import SampleDataModule
from modiff.lit.modules.calibration_config import CalibrationConfig
from modiff.lit.modules.student import LitStudent
from modiff.student.swap import operators
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import ZOO, TeacherSpec

RECIPES = Path(__file__).parents[2] / "recipes"


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_paper_rows", RECIPES / "make_paper_rows.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_paper_rows"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


script = _load_script()
BY_TEACHER = {row.protocol.teacher: row for row in script.ROWS if row.method == "modiff" and row.activation == 4}


def test_files_are_their_rows() -> None:
    paths = [row.path for row in script.ROWS]
    assert len(set(paths)) == len(paths)
    for row in script.ROWS:
        assert (RECIPES / row.path).read_text() == script.text_of(row), row.path


@pytest.mark.parametrize("teacher", sorted(BY_TEACHER))
def test_every_row_is_a_valid_recipe_that_says_what_was_published(teacher) -> None:
    rows = [row for row in script.ROWS if row.protocol.teacher == teacher]
    assert {row.method for row in rows} >= {"ptq", "modiff"}
    for row in rows:
        text = (RECIPES / row.path).read_text()
        assert re.search(rf"^# .*Published: {re.escape(row.published)}\.$", text, re.MULTILINE)
        recipe = yaml.safe_load(text)
        values = recipe["model"]
        config = QuantConfig.from_dict(values.pop("config"))
        assert (config.weight.bits, config.activation.bits) == (row.weight, row.activation)
        assert (config.modulation is not None) == row.method.endswith("modiff")
        calibration = values.pop("calibration", None)
        assert (calibration is not None) == row.method.startswith("qdiffusion")
        assert config.activation.range == ("calibrated" if calibration else "dynamic")
        if calibration:
            values["calibration"] = CalibrationConfig.from_dict(calibration)
            found = values["calibration"]
            assert (found.method, found.ranges, found.tuning_iterations) == ("brecq", "lsq", 0)
            assert found.split_concatenations == (teacher == "ddpm-cifar10")
        student = LitStudent(TeacherSpec(**values.pop("teacher")), config=config, **values)
        assert student.spec.name == teacher
        assert SampleDataModule(**recipe["data"], num_images=recipe["num_images"]).num_images == row.protocol.num_images
        make_scheduler(student.scheduler_name)
        assert tuple(rule.pattern for rule in config.rules) == ZOO[teacher].exclude


OPTIONS = ["--model.teacher.tiny", "true", "--model.features", "null", "--model.steps", "3", "--num_images", "2"]
OPTIONS += ["--data.batch_size", "2", "--wandb", "disabled", "--model.teacher.path", "null"]
OPTIONS += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
TINY_CALIBRATION = [word for field in script.TINY for word in f"--model.calibration.{field}".split()]
WITH_REPORT = ("ddpm-cifar10", "pixart-sigma")  # pictures take longer than a tiny model


@pytest.mark.parametrize("teacher", sorted(BY_TEACHER))
def test_one_row_of_each_teacher_runs_as_a_command(teacher, tmp_path, capsys) -> None:
    recipe = ["--config", str(RECIPES / BY_TEACHER[teacher].path), *OPTIONS, "--output", str(tmp_path / "out")]
    if teacher in WITH_REPORT:
        assert main(["evaluate", *recipe, "--error_images", "1"]) == 0, capsys.readouterr().err
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert metrics["student"]["relative_l2"] > 0
        assert metrics["cost"]["gbops_per_evaluation"] < metrics["cost"]["teacher_gbops_per_evaluation"]
    else:
        assert main(["sample", *recipe]) == 0, capsys.readouterr().err
        metrics = json.loads((tmp_path / "out" / "sample.json").read_text())
        assert len(list((tmp_path / "out" / "images" / "student").glob("*.png"))) == 2
    assert metrics["evaluations"]["quantized"] == metrics["evaluations"]["total"] - 1 > 0


@pytest.mark.parametrize("path", ["ddpm-cifar10/w4a4_qdiffusion.yaml", "ldm-church/w8a4_qdiffusion_modiff.yaml"])
def test_a_calibrated_row_runs_as_a_command(path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    recipe = ["--config", str(RECIPES / path), *OPTIONS, *TINY_CALIBRATION, "--output", str(tmp_path / "out")]
    recipe += ["--model.calibration.range_passes", "1", "--model.calibration.evaluations", "2"]
    assert main(["sample", *recipe]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "out" / "sample.json").read_text())
    total, quantized = metrics["evaluations"]["total"], metrics["evaluations"]["quantized"]
    assert (total, quantized) == (3, 2 if path.endswith("modiff.yaml") else 3)
    assert len(list((tmp_path / "cache" / "calibrations").iterdir())) == 1


DRAWN = sorted(path for path in RECIPES.rglob("w*.yaml"))


@pytest.fixture(scope="module")
def parsed() -> Callable[[Path], LitStudent]:
    """Builds what a recipe says, with a tiny teacher; one parser reads them all, because making one takes most time."""
    cli = StudentCLI("evaluate", ["--config", str(DRAWN[0]), *OPTIONS])

    def build(path: Path) -> LitStudent:
        tiny = [*OPTIONS]
        if "calibration:" in path.read_text():  # ranges only, in one pass: the calibrated rows above do it all
            tiny += ["--model.calibration.method", "nearest", "--model.calibration.ranges", "minmax"]
            tiny += ["--model.calibration.range_passes", "1", *TINY_CALIBRATION]
        cli.parser.set_defaults({"model.config": None, "model.calibration": None})  # else those of the last recipe
        with warnings.catch_warnings():  # the CLI silences it itself when it is made
            warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
            cli.parse_arguments(cli.parser, ["--config", str(path), *tiny])
        cli.instantiate_classes()
        return cli.model

    return build


def calibrated(module: LitStudent) -> torch.nn.Module:
    """The student of a module's recipe, calibrated."""
    found = module.calibration
    copy, run = module.shared_copy(), lambda student: draw(module, found, student)
    return calibrate(copy, module.config, run, found.method, settings=found.settings)


@pytest.mark.parametrize("path", ["ddpm-cifar10/w8a4_qdiffusion_modiff.yaml", "ldm-church/w8a4_qdiffusion.yaml"])
def test_shortcuts_have_a_range_for_each_half_where_q_diffusion_splits_them(path, parsed) -> None:
    module = parsed(RECIPES / path)
    module.configure_model()
    found = operators(calibrated(module))
    shortcuts = [name for name in operators(module.student) if re.match(r"up_blocks\..*conv_shortcut$", name)]
    assert shortcuts
    if path.startswith("ldm-church"):
        assert set(shortcuts) < set(found)
        return
    for name in shortcuts:
        assert name not in found
        first, second = (found[f"{name}.{half}"].calibrated for half in ("first", "second"))
        assert first.scale.shape == second.scale.shape == (1, 1)
        assert (first.scale, first.zero_point) != (second.scale, second.zero_point)
    assert len([name for name in found if name.endswith(".second")]) == len(shortcuts)


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_recipe_draws_with_a_tiny_model(path, parsed) -> None:
    module = parsed(path)
    module.configure_model()
    indices = torch.arange(1)
    if module.calibration is not None:
        module.use_student(calibrated(module), calibrated=True)
    with modiff.trajectory(module.student) as run:
        images, _ = module.draw("student", indices)
    assert images.shape == (1, *module.image_shape)
    assert images.isfinite().all()
    modulated = module.config.modulation is not None
    assert (run.total - run.quantized, run.total > 1) == (int(modulated), True)
