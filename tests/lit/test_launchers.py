"""The rank is decided once, by the launcher that Lightning will ask, whatever variables were left over."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.errors import ConfigError
from modiff.lit.cli.student import StudentCLI
from modiff.lit.runs.launchers import settle_rank, settle_single_rank

VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher, and the rank as it was afterwards."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rank_zero_only, "rank", 0)

    def set_(**variables: str) -> None:
        for key, value in variables.items():
            monkeypatch.setenv(key, value)

    return set_


def trainer(devices: int = 1, nodes: int = 1, plugins: object = None) -> SimpleNamespace:
    return SimpleNamespace(devices=devices, num_nodes=nodes, accelerator="cpu", plugins=plugins)


@pytest.mark.parametrize(
    ("command", "left_over"),
    [
        ("evaluate", {"RANK": "1"}),
        ("bench", {"RANK": "1"}),
        ("quantize", {"RANK": "1"}),
        ("quantize", {"LOCAL_RANK": "1"}),
        ("quantize", {"SLURM_PROCID": "3"}),
    ],
)
def test_left_over_variables_do_not_silence_a_run(
    modiff, recipe, tmp_path, environment, monkeypatch, command, left_over
) -> None:
    environment(**left_over)
    monkeypatch.setattr(rank_zero_only, "rank", int(next(iter(left_over.values()))))  # as Lightning sets it on import
    output = tmp_path / "out"
    if command == "bench":
        options = [recipe, "--batch_sizes", "2", "--rounds", "1", "--evaluations", "1", "--compile", "eager"]
    else:
        options = ["--config", recipe, "--num_images", "4"]
    status, _, err = modiff(command, *options, "--output", output)
    assert status == 0, err
    if command == "quantize":
        assert (output / "model.safetensors").is_file()
    else:
        assert json.loads((output / "run.json").read_text())["status"] == "complete"
    assert rank_zero_only.rank == 0


@pytest.mark.parametrize(
    ("variables", "of", "rank"),
    [
        ({}, trainer(2), 0),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, trainer(2), 1),  # a process Lightning started
        ({"NODE_RANK": "1"}, trainer(2, 2), 2),
        ({"NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, trainer(2, 2), 3),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, trainer(2, 2), 3),
        (
            {
                "SLURM_NTASKS": "2",
                "SLURM_NTASKS_PER_NODE": "2",
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_NNODES": "1",
            },
            trainer(2),
            1,
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            trainer(1, 2, "lightning.pytorch.plugins.environments.KubeflowEnvironment"),
            1,
        ),
    ],
)
def test_rank_by_launcher(environment, variables, of, rank) -> None:
    environment(**variables)
    assert settle_rank(of).rank == rank
    assert rank_zero_only.rank == rank


def test_launcher_decides_where_the_recipe_leaves_it_open(environment) -> None:
    environment(TORCHELASTIC_RUN_ID="x", RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    of = trainer("auto")
    assert settle_rank(of).rank == 3
    assert (of.devices, of.num_nodes) == (2, 2)
    of = trainer(1)
    with pytest.raises(ConfigError, match="torchrun started 4 processes, but the recipe asks for 1 devices"):
        settle_rank(of)


@pytest.mark.parametrize(
    ("variables", "of", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, trainer(), r"started 2 processes \(WORLD_SIZE=2\).*KubeflowEnvironment"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, trainer(1, 2), r"started 2 processes.*each would be a run of its own"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, trainer(), r"mpirun started 2 .*Use torchrun"),
        ({"PMI_SIZE": "4"}, trainer(4), r"mpirun started 4 processes \(PMI_SIZE=4\)"),
        (
            {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            trainer(2),
            r"srun started 2 processes .*srun --job-name=modiff",
        ),
        (
            {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4"},
            trainer(),
            r"job has 4 tasks, but the process was started without srun \(there is no SLURM_STEP_ID\)",
        ),
        ({"LOCAL_RANK": "0"}, trainer(2), r"LOCAL_RANK=0 is set, so Lightning would wait for 1 more process"),
        (
            {},
            trainer(plugins="lightning.pytorch.plugins.environments.KubeflowEnvironment"),
            "KubeflowEnvironment needs variables of its launcher: 'RANK' is missing",
        ),
    ],
)
def test_processes_that_lightning_would_not_find_are_refused(environment, variables, of, message) -> None:
    environment(**variables)
    with pytest.raises(ConfigError, match=message):
        settle_rank(of)


@pytest.fixture
def mpi(monkeypatch):
    """Process 1 of 2 as mpi4py says it, under any implementation of MPI."""
    world = SimpleNamespace(Get_size=lambda: 2, Get_rank=lambda: 1)
    monkeypatch.setattr("lightning.fabric.plugins.environments.mpi._MPI4PY_AVAILABLE", True)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world)))


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},  # Open MPI
        {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2"},  # MPICH, Intel MPI
    ],
)
def test_mpirun_is_recognized_by_mpi4py(environment, mpi, variables) -> None:
    environment(**variables)
    of = trainer("auto")
    launch = settle_rank(of)
    assert (launch.launcher, launch.rank, launch.world_size, of.devices, of.num_nodes) == ("mpirun", 1, 2, 2, 1)
    assert rank_zero_only.rank == 1
    with pytest.raises(ConfigError, match=r"mpirun started 2 processes, but .* Add --trainer.devices 2, or start 3"):
        settle_rank(trainer(3))
    with pytest.raises(ConfigError, match=r"modiff bench runs in one process, but mpirun started 2\."):
        settle_single_rank("bench")


def test_mpirun_of_several_nodes(environment, mpi) -> None:
    environment(MPI_LOCALNRANKS="1")
    of = trainer("auto")
    assert settle_rank(of).per_node == 1
    assert (of.devices, of.num_nodes) == (1, 2)


def test_mpi4py_without_mpi_is_said(environment, mpi, monkeypatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken())
    with pytest.raises(ConfigError, match=r"finds no MPI library \(cannot load MPI library\).*or uninstall mpi4py"):
        settle_rank(trainer())


def test_interactive_allocation_starts_its_own_processes(environment) -> None:
    environment(SLURM_NTASKS="4", SLURM_JOB_NAME="interactive", SLURM_PROCID="0")
    assert settle_rank(trainer(2)).world_size == 2


def test_commands_of_one_process_refuse_several(environment) -> None:
    environment(TORCHELASTIC_RUN_ID="x", RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    with pytest.raises(ConfigError, match=r"modiff bench runs in one process, but torchrun started 2\."):
        settle_single_rank("bench")


def test_a_rank_that_is_no_number_is_refused(modiff, recipe, environment) -> None:
    environment(RANK="first")
    status, _, err = modiff("evaluate", "--config", recipe)
    assert (status, err) == (1, "modiff: RANK is 'first'; allowed are whole numbers. Unset it.\n")


def test_looking_for_devices_leaves_the_rank_of_a_given_environment(environment, recipe, monkeypatch) -> None:
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    kubeflow = ["--trainer.plugins", "lightning.pytorch.plugins.environments.KubeflowEnvironment"]
    options = ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    StudentCLI("evaluate", ["--config", str(recipe), *options, *kubeflow])
    assert rank_zero_only.rank == 1
