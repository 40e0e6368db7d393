"""Overlays, SLURM scripts, sweeps and manifests: what they name exists, and they fit recipes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from modiff.lit.cli.student import StudentCLI
from modiff.lit.cli.sweeps import is_sweep, sweep_arms

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "recipes" / "trainer").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
IDS = {"ids": lambda path: path.stem}


@pytest.mark.parametrize("overlay", OVERLAYS, **IDS)
def test_overlay_changes_the_trainer_alone(overlay) -> None:
    assert {path.stem for path in OVERLAYS} == {"cpu", "gpu1", "gpu8", "slurm"}
    wanted = yaml.safe_load(overlay.read_text())
    assert list(wanted) == ["trainer"]
    recipe = ROOT / "recipes" / "mnist" / "w8a4_modiff.yaml"
    # Its devices are not looked for here: the same fields on CPUs.
    args = ["--config", str(recipe), "--config", str(overlay), "--trainer.accelerator", "cpu"]
    config = StudentCLI("evaluate", args).config
    for key in ("devices", "num_nodes"):
        assert int(config.trainer[key]) == wanted["trainer"][key]
    assert config.model.steps == 50


@pytest.mark.parametrize("script", SCRIPTS, **IDS)
def test_slurm_script_is_queued_again_where_it_was_stopped(script) -> None:
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=USR1@120" in text
    assert '[ "$code" -eq 75 ]' in text
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text
    for name in re.findall(r"recipes/[\w/-]+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("sweep", SWEEPS, **IDS)
def test_sweep_names_fields_that_exist(sweep) -> None:
    assert is_sweep(str(sweep))
    arms = sweep_arms(str(sweep))
    assert len(arms) == 4
    assert (ROOT / arms[0].recipe).is_file()
    assert (ROOT / yaml.safe_load(sweep.read_text())["program"]).is_file()
    StudentCLI("evaluate", ["--config", str(ROOT / arms[-1].recipe), *arms[-1].options])


def test_kubernetes_manifest_is_one_job_of_four() -> None:
    documents = list(yaml.safe_load_all((ROOT / "recipes" / "kubernetes" / "evaluate.yaml").read_text()))
    service, job = documents
    spec = job["spec"]["template"]["spec"]
    args = spec["containers"][0]["args"]
    assert spec["subdomain"] == service["metadata"]["name"]
    assert f"--nnodes={job['spec']['completions']}" in args
    assert f"--trainer.num_nodes={job['spec']['parallelism']}" in args
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75, 130]
    for part in args:
        name = part.rpartition("=")[2]
        assert not name.startswith("recipes/") or (ROOT / name).is_file(), name
