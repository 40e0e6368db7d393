"""Weights & Biases without surprises: never a prompt, never a crash."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

WandbMode = Literal["auto", "online", "offline", "disabled"]


def has_credentials() -> bool:
    """Whether an API key is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        path = os.environ.get("NETRC")
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def make_wandb_logger(
    mode: WandbMode, folder: Path, name: str, config: dict[str, Any], group: str | None = None
) -> WandbLogger | None:
    """A logger, or None where it is disabled, this is not rank 0, or W&B cannot start.

    ``auto`` is online with credentials and offline without; then one line says where the run lies and how to sync it.
    The environment variable ``WANDB_MODE`` overrides ``auto``.
    """
    if rank_zero_only.rank not in (None, 0):
        return None
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        mode = wanted if wanted in ("online", "offline", "disabled") else ("online" if has_credentials() else "offline")  # type: ignore[assignment]
    if mode == "disabled":
        return None
    if mode == "online" and not has_credentials():
        print("W&B: --wandb online, but there are no credentials (WANDB_API_KEY or netrc); logging offline instead.")
        mode = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        logger = WandbLogger(
            name=name,
            save_dir=str(folder),
            project=os.environ.get("WANDB_PROJECT", "modiff"),
            group=group,
            offline=mode == "offline",
            config=config,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        run = logger.experiment
    except Exception as error:  # whatever W&B raises must not stop a run
        print(f"W&B: not available ({type(error).__name__}: {error}); metrics go to CSV only.")
        return None
    if mode == "offline":
        print(f"W&B: offline run in {Path(run.dir).parent}; upload it with: wandb sync {Path(run.dir).parent}")
    return logger


def finish_wandb(logger: WandbLogger | None) -> None:
    """Close the run, so that the next one in this process is a new one."""
    if logger is None:
        return
    try:
        logger.experiment.finish()
    except Exception as error:
        print(f"W&B: the run did not close cleanly ({type(error).__name__}: {error}).")
