"""Where a result comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

import modiff
from modiff.storage.hashing import short_hash


class Provenance(Callback):
    """Puts commit, versions, recipe hash, seed and machine beside every result.

    Args:
        recipe: Name of the recipe.
        config: The full recipe.
        seed: Of the run.
    """

    def __init__(self, recipe: str, config: dict[str, Any], seed: int) -> None:
        self.recipe = recipe
        self.config = config
        self.seed = seed

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Collect the facts before anything is drawn."""
        pl_module.result.provenance = {
            "recipe": self.recipe,
            "recipe_hash": short_hash(self.config),
            "teacher_hash": pl_module.loaded.fingerprint,
            "seed": self.seed,
            "git_commit": git_commit(),
            "python": platform.python_version(),
            **package_versions("modiff", "torch", "lightning", "diffusers", "numpy"),
            "device": device_name(pl_module.device),
            "threads": torch.get_num_threads(),
            "world_size": trainer.world_size,
        }

    on_predict_start = on_test_start


def git_commit() -> str | None:
    """Commit of the source tree modiff runs from, ``-dirty`` where it was changed; None for an installed package."""
    folder = Path(modiff.__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != folder.parent.resolve():
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: torch.device) -> str:
    """Name of the processor in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_versions(*names: str) -> dict[str, str | None]:
    """Installed versions; None where a package is not installed."""
    return {name: _version(name) for name in names}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
