"""The command line: help, overrides, presets, and one plain sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modiff.lit.cli import COMMANDS, main


def test_help_names_every_command_and_imports_nothing_heavy(modiff) -> None:
    status, out, _ = modiff("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)
    code = (
        "import sys; from modiff.lit.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('lightning', 'diffusers', 'wandb', 'jsonargparse')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_version(modiff) -> None:
    status, out, _ = modiff("--version")
    assert status == 0
    assert out.startswith("modiff ")


def test_unknown_command_is_refused(modiff) -> None:
    status, _, err = modiff("evalute")
    assert status == 2
    assert "unknown command 'evalute'; allowed are evaluate, compare" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.preset", "w8a4-modif"], "unknown preset 'w8a4-modif'; allowed are"),
        (["--model.preset", "w9a4-modiff"], "unknown preset 'w9a4-modiff'"),
        (["--model.config.activation.bits", "9"], "bits is 9; allowed are whole numbers, 2 to 8"),
        (["--model.config.activation.bits", "4.5"], "model.config.activation.bits: Expected a <class 'int'>"),
        (["--model.config.activaton.bits", "4"], "unrecognized arguments: --activaton.bits=4"),
        (["--model.stepps", "4"], "--model.stepps"),
        (["--model.steps", "0"], "steps is 0; allowed are whole numbers, 1 or more"),
        (["--model.eta", "2"], "eta is 2.0; allowed is 0 to 1"),
        (["--model.teacher.path", "null", "--model.teacher.name", "mnits"], "unknown teacher 'mnits'; allowed are mnist"),
        (["--model.teacher.path", "nowhere"], "does not exist"),
        (["--model.features", "nowhere.safetensors"], "Feature network nowhere.safetensors does not exist"),
        (["--model.reference", "nowhere.npz"], "nowhere.npz"),
        (["--model.scheduler", "ddmi"], "ddmi"),
        (["--model.steps", "101"], "101"),
        (["--data.batch_size", "0"], "data.batch_size is 0; allowed are whole numbers, 1 or more"),
        (["--num_images", "0"], "num_images is 0; allowed are whole numbers, 1 or more"),
        (["--trainer.inference_mode", "true"], "trainer.inference_mode must be False"),
        (["--trainer.use_distributed_sampler", "true"], "trainer.use_distributed_sampler must be False"),
        (["--model.config", "null", "--model.preset", "null"], "Nothing is quantized: give --model.preset"),
        (["--wandb", "sometimes"], "wandb"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_wrong_option_is_one_plain_sentence_and_writes_nothing(modiff, recipe, tmp_path, options, message) -> None:
    output = tmp_path / "out"
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", output)
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not output.exists()


def test_missing_recipe(modiff) -> None:
    status, _, err = modiff("evaluate", "--config", "nowhere.yaml")
    assert status == 1
    assert "--config nowhere.yaml does not exist. Give a recipe" in err


def test_rule_that_matches_nothing_writes_nothing(modiff, recipe, tmp_path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("model:\n  preset: null\n  config:\n    weight: {bits: 8}\n    rules: [{pattern: convin, skip: true}]\n")
    status, _, err = modiff("evaluate", "--config", recipe, "--config", rules, "--output", tmp_path / "out")
    assert status == 1
    assert "'convin' matches no operator" in err
    assert not (tmp_path / "out").exists()


def test_preset_and_config_together_are_refused(modiff, recipe, tmp_path) -> None:
    both = tmp_path / "both.yaml"
    both.write_text(recipe.read_text().replace("  preset: w8a4-modiff", "  preset: w8a4-modiff\n  config: {weight: {bits: 8}}"))
    status, _, err = modiff("evaluate", "--config", both, "--output", tmp_path / "out")
    assert status == 1
    assert "preset 'w8a4-modiff' and a config" in err


def test_preset_expands_before_overrides(recipe, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--config", str(recipe), "--model.config.activation.bits", "3", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["config"]["activation"]["bits"] == 3
    assert printed["model"]["config"]["activation"]["granularity"] == "sample"
    assert printed["model"]["config"]["modulation"]["error_compensation"] is True


def test_saved_config_round_trips_with_its_nulls(modiff, recipe, tmp_path) -> None:
    output = tmp_path / "out"
    options = ["--model.config.modulation.refresh_every", "null", "--model.config.weight", "null"]
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", output)
    assert status == 0, err
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["model"]["config"]["weight"] is None
    assert saved["model"]["config"]["modulation"]["refresh_every"] is None
    again = tmp_path / "again"
    status = modiff("evaluate", "--config", output / "config.yaml", "--output", again)[0]
    assert status == 0
    other = yaml.safe_load((again / "config.yaml").read_text())
    assert {**other, "output": None} == {**saved, "output": None}
    assert _images(again) == _images(output)


def _images(folder: Path) -> bytes:
    return (folder / "samples.safetensors").read_bytes()
