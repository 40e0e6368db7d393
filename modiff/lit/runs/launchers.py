"""Agreement between the launcher that started this process and the recipe."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from modiff.errors import ConfigError


def check_world_size(trainer: Any) -> None:
    """Refuse a launcher that started another number of processes than the recipe asks for.

    Left alone, Lightning would take each for a run of its own, and all would write the same files.

    Args:
        trainer: The ``trainer`` section of a parsed recipe.

    Raises:
        ConfigError: The launcher's world size differs from ``devices`` x ``num_nodes``, or ``devices`` is no number.
    """
    devices, nodes = wanted_devices(trainer.devices, trainer.accelerator), int(trainer.num_nodes)
    launched = launched_processes()
    if launched is None:
        return
    launcher, world, per_node = launched
    if world == devices * nodes:
        return
    fix = f"--trainer.devices {per_node}" + (f" --trainer.num_nodes {world // per_node}" if world > per_node else "")
    if world == per_node and nodes > 1:
        fix += " --trainer.num_nodes 1"
    raise ConfigError(
        f"{launcher} started {world} processes, but the recipe asks for {devices} devices on {nodes} nodes "
        f"({devices * nodes} processes). Add {fix}, or start {devices * nodes} processes."
    )


def launched_processes() -> tuple[str, int, int] | None:
    """Name of the launcher, its world size and its processes per node; None where there is no launcher."""
    if TorchElasticEnvironment.detect():
        world = TorchElasticEnvironment().world_size()
        return "torchrun", world, int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if SLURMEnvironment.detect():
        try:
            world = SLURMEnvironment().world_size()
        except RuntimeError as error:  # Lightning's own refusal, of --ntasks without --ntasks-per-node
            raise ConfigError(str(error)) from error
        return "srun", world, max(1, world // int(os.environ.get("SLURM_NNODES", "1")))
    return None


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
