"""Recipes of the paper's rows: written from their table, all valid, one of each teacher run on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from modiff.config import QuantConfig
from modiff.lit.cli import main
from modiff.lit.conditions import SampleDataModule
from modiff.lit.student import LitStudent
from modiff.teachers.schedulers import make_scheduler
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
    assert {row.method for row in rows} == {"ptq", "modiff"}
    for row in rows:
        text = (RECIPES / row.path).read_text()
        assert re.search(rf"^# .*Published: {re.escape(row.published)}\.$", text, re.MULTILINE)
        recipe = yaml.safe_load(text)
        values = recipe["model"]
        config = QuantConfig.from_dict(values.pop("config"))
        assert (config.weight.bits, config.activation.bits) == (row.weight, row.activation)
        assert (config.modulation is not None) == (row.method == "modiff")
        student = LitStudent(TeacherSpec(**values.pop("teacher")), config=config, **values)
        assert student.spec.name == teacher
        assert SampleDataModule(**recipe["data"], num_images=recipe["num_images"]).num_images == row.protocol.num_images
        make_scheduler(student.scheduler_name)
        assert tuple(rule.pattern for rule in config.rules) == ZOO[teacher].exclude


OPTIONS = ["--model.teacher.tiny", "true", "--model.features", "null", "--model.steps", "3", "--num_images", "2"]
OPTIONS += ["--data.batch_size", "2", "--wandb", "disabled"]
OPTIONS += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
WITH_REPORT = ("ddpm-cifar10", "pixart-sigma")  # pictures take longer than a tiny model


@pytest.mark.parametrize("teacher", sorted(BY_TEACHER))
def test_one_row_of_each_teacher_runs_on_a_tiny_model(teacher, tmp_path, capsys) -> None:
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
