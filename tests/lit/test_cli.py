"""The command line: help, overrides, presets, and one plain sentence for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modiff.lit.cli.main import COMMANDS, main


def test_help_names_every_command_and_imports_nothing_heavy(modiff) -> None:
    status, out, _ = modiff("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)
    code = (
        "import sys; from modiff.lit.cli.main import main; main(['--help']); "
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
        (["--model.config.activation.bits", "4.5"], "model.config.activation: bits is 4.5; allowed are whole numbers"),
        (
            ["--model.config.activaton.bits", "4"],
            "model.config: QuantConfig has no field 'activaton'; allowed are weight",
        ),
        (["--model.config.activation.bitts=4"], "model.config.activation: QuantSpec has no field 'bitts'; allowed are"),
        (["--model.config.modulation.refresh_every", "0"], "model.config.modulation: refresh_every is 0; allowed"),
        (["--model.config.backend.name", "x"], "model.config has no field 'name' to override"),
        (["--model.config.activation.bits"], "--model.config.activation.bits is given without a value"),
        (["--model.stepps", "4"], "--model.stepps"),
        (["--model.steps", "0"], "steps is 0; allowed are whole numbers, 1 or more"),
        (["--model.eta", "2"], "eta is 2.0; allowed is 0 to 1"),
        (
            ["--model.teacher.path", "null", "--model.teacher.name", "mnits"],
            "unknown teacher 'mnits'; allowed are mnist",
        ),
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
    assert "Recipe nowhere.yaml does not exist. Give a file, such as recipes/" in err


def test_rule_that_matches_nothing_writes_nothing(modiff, recipe, tmp_path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "model:\n  preset: null\n  config:\n    weight: {bits: 8}\n    rules: [{pattern: convin, skip: true}]\n"
    )
    status, _, err = modiff("evaluate", "--config", recipe, "--config", rules, "--output", tmp_path / "out")
    assert status == 1
    assert "'convin' matches no operator" in err
    assert not (tmp_path / "out").exists()


def test_preset_and_config_together_are_refused(modiff, recipe, tmp_path) -> None:
    both = tmp_path / "both.yaml"
    both.write_text(
        recipe.read_text().replace("  preset: w8a4-modiff", "  preset: w8a4-modiff\n  config: {weight: {bits: 8}}")
    )
    status, _, err = modiff("evaluate", "--config", both, "--output", tmp_path / "out")
    assert status == 1
    assert "preset 'w8a4-modiff' and a config" in err


def test_preset_expands_before_overrides(recipe, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--config", str(recipe), "--model.config.activation.bits", "3", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["config"]["activation"]["bits"] == 3
    assert printed["model"]["config"]["activation"]["granularity"] == "sample_channel"
    assert printed["model"]["config"]["vectors"]["activation"]["bits"] == 8
    assert printed["model"]["config"]["modulation"]["error_compensation"] is True


@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        (["--model.config.modulation.refresh_every", "null"], ("modulation", "refresh_every"), None),
        (["--model.config.modulation.refresh_every=None"], ("modulation", "refresh_every"), None),
        (["--model.config.modulation.refresh_every=7"], ("modulation", "refresh_every"), 7),
        (["--model.config.modulation.state_dtype", "null"], ("modulation", "state_dtype"), None),
        (["--model.config.activation.group_size", "null"], ("activation", "group_size"), None),
        (["--model.config.activation.clip", "1e-1"], ("activation", "clip"), 0.1),
        (["--model.config.modulation", "null"], ("modulation",), None),
        (["--model.config.weight", "{bits: 4}"], ("weight", "bits"), 4),
    ],
)
def test_one_field_is_overridden_null_included(recipe, options, path, value) -> None:
    from modiff.lit.cli.student import StudentCLI

    found = StudentCLI("evaluate", ["--config", str(recipe), *options]).model.config
    for name in path:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_null_overrides_a_value_of_the_recipe(recipe, tmp_path) -> None:
    from modiff.lit.cli.student import StudentCLI

    other = tmp_path / "refreshed.yaml"
    config = "  config:\n    activation: {bits: 4}\n    modulation: {refresh_every: 5}\n"
    other.write_text(recipe.read_text().replace("  preset: w8a4-modiff\n", config))
    assert StudentCLI("evaluate", ["--config", str(other)]).model.config.modulation.refresh_every == 5
    args = ["--config", str(other), "--model.config.modulation.refresh_every", "null"]
    config = StudentCLI("evaluate", args).model.config
    assert config.modulation.refresh_every is None
    assert config.activation.bits == 4


def test_later_recipe_wins_field_by_field(recipe, tmp_path) -> None:
    from modiff.lit.cli.student import StudentCLI

    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model:\n  preset: null\n  config:\n    weight: {bits: 8, clip: 0.9}\n    activation: {bits: 4}\n")
    second.write_text("model:\n  config:\n    weight: {bits: 4}\n    activation: null\n")
    args = [part for path in (recipe, first, second) for part in ("--config", str(path))]
    config = StudentCLI("evaluate", args).model.config
    assert (config.weight.bits, config.weight.clip, config.activation) == (4, 0.9, None)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- a", "is not a recipe: it holds ['a']")])
def test_recipe_that_is_none(modiff, tmp_path, text, message) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    status, _, err = modiff("evaluate", "--config", path, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("launcher", "options", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            ["--trainer.devices", "1"],
            "torchrun started 2 processes",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            ["--trainer.devices", "4"],
            "but the recipe asks for 4 devices on 1 nodes (4 processes). Add --trainer.devices 4 --trainer.num_nodes 2",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, [], "Use `--ntasks-per-node=4` instead"),
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"},
            ["--trainer.devices", "1"],
            "srun started 4 processes",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            ["--trainer.devices", "2", "--trainer.num_nodes", "2"],
            "Add --trainer.devices 2 --trainer.num_nodes 1, or start 4 processes",
        ),
    ],
)
def test_launcher_that_disagrees_is_refused(modiff, recipe, tmp_path, monkeypatch, launcher, options, message) -> None:
    for key, value in launcher.items():
        monkeypatch.setenv(key, value)
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_launcher_that_agrees_is_accepted(recipe, monkeypatch) -> None:
    from modiff.lit.cli.student import StudentCLI

    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    options = ["--trainer.devices", "2", "--trainer.num_nodes", "2"]
    assert StudentCLI("evaluate", ["--config", str(recipe), *options]).config.trainer.devices in (2, "2")


def test_saved_config_round_trips_with_its_nulls(modiff, recipe, tmp_path) -> None:
    output = tmp_path / "out"
    options = ["--model.config.weight", "null"]
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", output)
    assert status == 0, err
    saved = yaml.safe_load((output / "config.yaml").read_text())
    assert saved["model"]["config"]["weight"] is None
    assert saved["model"]["config"]["modulation"]["refresh_every"] is None
    again = tmp_path / "again"
    status, _, err = modiff("evaluate", "--config", output / "config.yaml", "--output", again)
    assert status == 0, err
    other = yaml.safe_load((again / "config.yaml").read_text())
    assert {**other, "output": None} == {**saved, "output": None}
    assert _images(again) == _images(output)


def _images(folder: Path) -> bytes:
    return (folder / "samples.safetensors").read_bytes()
