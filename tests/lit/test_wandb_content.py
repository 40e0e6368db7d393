"""What an offline W&B run holds, read back from its file; and that the dashboard names nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from wandb_files import read_offline

from modiff.lit.runs import wandb_content as keys
from modiff.lit.runs.dashboard import build, dashboard, used_keys


@pytest.fixture(scope="module")
def offline(tmp_path_factory, recipe_text):
    """A finished run of ``modiff evaluate --wandb offline``."""
    folder = tmp_path_factory.mktemp("offline")
    recipe = folder / "recipes" / "mine" / "tiny.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(recipe_text.replace("wandb: disabled", "wandb: offline"))
    # In a process of its own, as a user's: other tests end the children of this one, and W&B's server among them.
    left_out = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_NAME", "WANDB_DIR")
    environ = {key: value for key, value in os.environ.items() if key not in left_out}
    environ |= {key: str(folder / key) for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    environ["MODIFF_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", "modiff.lit.cli.main", "evaluate", "--config", str(recipe)]
    done = subprocess.run([*command, "--output", str(folder / "out")], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "out" / "wandb").glob("offline-run-*")
    return folder / "out", read_offline(run)


def test_run_says_what_it_is(offline) -> None:
    out, found = offline
    assert found.run.run_id == json.loads((out / "wandb.json").read_text())["id"]
    assert (found.run.display_name, found.run.job_type) == ("mine/tiny", "evaluate")
    assert {"mine", "tiny"} <= set(found.run.tags)
    config = {item.key: json.loads(item.value_json) for item in found.run.config.update}
    assert config["model"]["config"]["activation"]["bits"] == 4
    assert config["num_images"] == 8


def test_curves_have_the_time_step_as_their_axis(offline) -> None:
    out, found = offline
    assert found.axes["trajectory/*"] == keys.TIMESTEP
    assert found.axes["progress/*"] == keys.IMAGES_DONE
    errors = json.loads((out / "trajectory_errors.json").read_text())
    points = [(row[keys.TIMESTEP], row[keys.SAMPLE_ERROR]) for row in found.rows if keys.SAMPLE_ERROR in row]
    assert points == list(zip(errors["timesteps"], errors["sample_error"], strict=True))
    assert all(row[keys.WORST_ERROR] >= row[keys.OPERATOR_ERROR] for row in found.rows if keys.WORST_ERROR in row)
    done = [row[keys.IMAGES_DONE] for row in found.rows if keys.IMAGES_DONE in row]
    assert done[-1] == 8


def test_tables_and_pictures_are_there(offline) -> None:
    out, found = offline
    table = found.table(keys.ERROR_TABLE)
    errors = json.loads((out / "trajectory_errors.json").read_text())
    recorded = [v for row in errors["operator_error"] for v in row if v is not None]
    assert (table["columns"], len(table["data"])) == (["operator", "timestep", "error"], len(recorded))
    samples = found.table(keys.SAMPLE_TABLE)
    assert samples["columns"] == ["index", "seed", "teacher", "student"]
    assert [row[0] for row in samples["data"]] == [0, 1, 2, 3]
    (pictures,) = [files for (_, name), (_, files) in found.artifacts.items() if "tablessamples" in name]
    assert len([path for path in pictures if path.endswith(".png")]) == 8  # four pairs
    assert [row[0] for row in found.table(keys.COST_TABLE)["data"]] == [
        row["name"] for row in json.loads((out / "cost.json").read_text())
    ]
    for key in keys.PICTURES.values():
        (value,) = [row[key] for row in found.rows if key in row]
        assert (found.folder / "files" / value["path"]).is_file()


def test_figures_are_in_the_summary(offline) -> None:
    out, found = offline
    metrics = json.loads((out / "metrics.json").read_text())
    assert found.summary["student.psnr_db"] == metrics["student"]["psnr_db"]
    assert found.summary["cost.weight_mib"] == metrics["cost"]["weight_mib"]


def test_artifacts_say_what_was_used_and_made(offline) -> None:
    _, found = offline
    by_kind = {kind: (name, used, files) for (kind, name), (used, files) in found.artifacts.items()}
    assert by_kind["teacher"][1] is True
    assert by_kind["result"][:2] == ("result-mine-tiny", False)
    assert {"config.yaml", "metrics.json", "report.html"} <= set(by_kind["result"][2])
    assert by_kind["student"] == ("student-mine-tiny", False, ["config.json", "model.safetensors"])


def test_dashboard_names_only_keys_that_exist(offline, modiff, tmp_path) -> None:
    status, said, err = modiff("dashboard", "--json", tmp_path / "board.json", "--project", "p")
    assert status == 0, err
    assert f"Dashboard: {tmp_path / 'board.json'}" in said
    found = json.loads((tmp_path / "board.json").read_text())
    assert found == json.loads(json.dumps(dashboard("p")))
    missing = used_keys(found) - offline[1].keys
    assert missing == set()
    assert len(used_keys(found)) > 12


def test_dashboard_is_built_by_wandb_workspaces() -> None:
    pytest.importorskip("wandb_workspaces")
    workspace, report = build(dashboard("p", "e"))
    assert [section.name for section in workspace.sections] == [
        "Quality",
        "Error over time",
        "Samples",
        "Cost",
        "Progress",
    ]
    assert sum(type(block).__name__ == "PanelGrid" for block in report.blocks) == 3


def test_sweep_is_a_comparison_without_wandb(tmp_path, recipe) -> None:
    from modiff.lit.cli.sweeps import is_sweep, sweep_arms
    from modiff.lit.commands.compare import arms_of

    sweep = {"method": "grid", "parameters": {"model.config.activation.bits": {"values": [3, 4]}, "seed": {"value": 1}}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, "command": ["${env}", "evaluate", "--config", str(recipe), "${args}"]}))
    assert is_sweep(str(path))
    assert not is_sweep(str(recipe))
    arms = sweep_arms(str(path))
    assert [arm.name for arm in arms] == ["sweep_bits-3", "sweep_bits-4"]
    assert arms[0].options == ["--model.config.activation.bits=3", "--seed=1"]
    assert [arm.recipe for arm in arms_of([str(recipe), str(path)])] == [str(recipe)] * 3
