"""Who started this process: the one place that decides rank and world size, before any work.

Lightning reads ``RANK``, ``LOCAL_RANK`` and ``SLURM_PROCID`` when it is imported, whatever they belong to, and asks the
launcher only when it starts. Both would disagree where such a variable was left over, so the rank is settled here, by
the cluster environment that the Trainer is going to choose.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.errors import ConfigError

WORLD_SIZES = {
    "WORLD_SIZE": "",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Variables that say how many processes were started, and by what; read where Lightning recognizes no launcher."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run.

    Args:
        launcher: Its name; empty: this process was started alone, and Lightning may start others.
        rank: Of this process among all.
        world_size: Processes in all.
        per_node: Processes on each node.
    """

    launcher: str
    rank: int
    world_size: int
    per_node: int


def settle_rank(trainer: Any) -> Launch:
    """Decide the rank of this process by the Trainer's cluster environment, and tell Lightning's helpers.

    Where the recipe leaves the devices open (``auto``), a launcher's number is taken.

    Args:
        trainer: The ``trainer`` section of a parsed recipe.

    Raises:
        ConfigError: The launcher started another number of processes than the recipe asks for, or several processes
            that Lightning would each take for a run of its own.
    """
    launch = _launched(trainer)
    if launch is not None and trainer.devices in ("auto", -1, "-1"):
        trainer.devices = launch.per_node
        if int(trainer.num_nodes) == 1:
            trainer.num_nodes = max(1, launch.world_size // launch.per_node)
    devices, nodes = wanted_devices(trainer.devices, trainer.accelerator), int(trainer.num_nodes)
    if launch is None:
        launch = _alone(devices, nodes)
    elif launch.world_size != devices * nodes:
        raise ConfigError(_mismatch(launch, devices, nodes))
    rank_zero_only.rank = launch.rank
    return launch


def settle_single_rank(command: str) -> None:
    """The same for a command that runs in one process.

    Raises:
        ConfigError: A launcher started several.
    """
    launch = _launched(None) or _alone(1, 1)
    if launch.world_size > 1:
        raise ConfigError(f"modiff {command} runs in one process, but {launch.launcher} started {launch.world_size}.")
    rank_zero_only.rank = 0


def _mismatch(launch: Launch, devices: int, nodes: int) -> str:
    world, per_node = launch.world_size, launch.per_node
    fix = f"--trainer.devices {per_node}" + (f" --trainer.num_nodes {world // per_node}" if world > per_node else "")
    if world == per_node and nodes > 1:
        fix += " --trainer.num_nodes 1"
    return (
        f"{launch.launcher} started {world} processes, but the recipe asks for {devices} devices on {nodes} nodes "
        f"({devices * nodes} processes). Add {fix}, or start {devices * nodes} processes."
    )


def _launched(trainer: Any) -> Launch | None:
    """What a launcher that Lightning recognizes did, in the order in which Lightning asks; None: there is none."""
    given = _given_environment(trainer)
    if given is not None:
        try:
            environment = given()
            rank, world = environment.global_rank(), environment.world_size()
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{given.__name__} needs variables of its launcher: {error} is missing.") from error
        return Launch(given.__name__, rank, world, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if TorchElasticEnvironment.detect():
        world = TorchElasticEnvironment().world_size()
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return Launch("torchrun", int(os.environ.get("RANK", 0)), world, per_node)
    if SLURMEnvironment.detect():
        return _by_srun()
    if LSFEnvironment.detect():
        lsf = LSFEnvironment()
        return Launch("jsrun", lsf.global_rank(), lsf.world_size(), lsf.world_size())
    return _by_mpirun()


def _by_mpirun() -> Launch | None:
    """What mpi4py says, by which Lightning recognizes mpirun; None: it is not installed, or this process is alone."""
    try:
        found = MPIEnvironment.detect()
    except RuntimeError as error:
        raise ConfigError(
            f"mpi4py is installed, but finds no MPI library ({str(error).splitlines()[0]}), and Lightning asks it who "
            "started this process. Install MPI, put it on LD_LIBRARY_PATH, or uninstall mpi4py."
        ) from error
    if not found:
        return None
    mpi = MPIEnvironment()
    world = mpi.world_size()
    local = next(
        (os.environ[name] for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS") if name in os.environ), world
    )
    return Launch("mpirun", mpi.global_rank(), world, int(local))


def _given_environment(trainer: Any) -> type[ClusterEnvironment] | None:
    """Class of the cluster environment among the Trainer's plugins, where the recipe names one."""
    plugins = getattr(trainer, "plugins", None) or []
    for plugin in plugins if isinstance(plugins, (list, tuple)) else [plugins]:
        path = plugin if isinstance(plugin, str) else getattr(plugin, "class_path", "")
        module, _, name = str(path).rpartition(".")
        if not module:
            continue
        found = getattr(__import__(module, fromlist=[name]), name, None)
        if isinstance(found, type) and issubclass(found, ClusterEnvironment):
            return found
    return None


def _by_srun() -> Launch:
    tasks = int(os.environ["SLURM_NTASKS"])
    if "SLURM_STEP_ID" not in os.environ:
        raise ConfigError(
            f"This SLURM job has {tasks} task{'s' if tasks > 1 else ''}, but the process was started without srun "
            "(there is no SLURM_STEP_ID). Put srun before the command; or set SLURM_JOB_NAME=interactive: then "
            "Lightning starts the processes of --trainer.devices itself, on this node."
        )
    try:
        world = SLURMEnvironment().world_size()
    except RuntimeError as error:  # Lightning's own refusal, of --ntasks without --ntasks-per-node
        raise ConfigError(str(error)) from error
    per_node = max(1, world // int(os.environ.get("SLURM_NNODES", "1")))
    return Launch("srun", int(os.environ.get("SLURM_PROCID", 0)), world, per_node)


def _alone(devices: int, nodes: int, environ: Mapping[str, str] = os.environ) -> Launch:
    """The rank where Lightning recognizes no launcher: it starts the other processes, or somebody did by hand.

    Raises:
        ConfigError: Others were started that Lightning would not find.
    """
    wanted = devices * nodes
    local = int(environ.get("LOCAL_RANK", 0))
    rank = int(environ.get("NODE_RANK", environ.get("GROUP_RANK", 0))) * devices + local
    for name, launcher in WORLD_SIZES.items():
        world = int(environ.get(name) or 1)
        said = next((k for k in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID") if k in environ), None)
        found = world == wanted and (said is None or int(environ[said]) == rank) and launcher == ""
        if world > 1 and not found:
            raise ConfigError(
                f"{launcher or 'A launcher'} started {world} processes ({name}={world}), but nothing that Lightning "
                f"recognizes: each would be a run of its own. {_advice(launcher)}"
            )
    if wanted > 1 and "LOCAL_RANK" in environ and not {"WORLD_SIZE", "MASTER_PORT"} & set(environ):
        raise ConfigError(
            f"LOCAL_RANK={local} is set, so Lightning would wait for {wanted - 1} more process(es) that nobody started "
            "(neither WORLD_SIZE nor MASTER_PORT is set). Unset LOCAL_RANK, and Lightning starts them."
        )
    # One process is rank 0, whatever variables say that other programs left over.
    return Launch("", rank if wanted > 1 else 0, wanted, devices)


def _advice(launcher: str) -> str:
    if launcher == "srun":
        return "In an allocation named 'bash' or 'interactive', name the step: srun --job-name=modiff."
    if launcher == "mpirun":
        return "Use torchrun, or install mpi4py, by which Lightning recognizes it."
    return (
        "Use torchrun, or under Kubeflow --trainer.plugins lightning.pytorch.plugins.environments.KubeflowEnvironment; "
        "or unset it."
    )


def wanted_devices(devices: Any, accelerator: str) -> int:
    """Devices per node that ``trainer.devices`` stands for.

    >>> wanted_devices(2, "cpu"), wanted_devices("auto", "cpu"), wanted_devices([0, 3], "gpu")
    (2, 1, 2)

    Raises:
        ConfigError: It stands for no number of devices.
    """
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if devices not in ("auto", -1, "-1"):
        try:
            return int(devices)
        except ValueError as error:
            raise ConfigError(f"trainer.devices is {devices!r}; give a whole number, a list, or auto.") from error
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if on_gpu else 1
