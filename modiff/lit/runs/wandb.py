"""Weights & Biases without surprises: never a prompt, never a crash; one run for each job, also after a restart."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.storage.atomic import write_json

WandbMode = Literal["auto", "online", "offline", "disabled"]
ID_FILE = "wandb.json"
REACH_S, START_S, FINISH_S = 3.0, 30, 60.0


def has_credentials() -> bool:
    """Whether W&B itself finds an API key: in the environment, in the netrc file, or in its settings."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        return bool(wandb.login(prompt=False, verify=False))  # type: ignore[call-arg,unused-ignore]
    except TypeError:  # releases before 0.31 take no prompt=
        return bool(wandb.api.api_key)
    except Exception:  # a key of a wrong form: none that could be used
        return False


def unreachable() -> str | None:
    """Why the server cannot be reached, in a few seconds; None where it can be, or a proxy decides."""
    import wandb

    base = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    proxies = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):
        return None
    port = base.port or (80 if base.scheme == "http" else 443)
    try:
        socket.create_connection((base.hostname or "", port), timeout=REACH_S).close()
    except OSError as error:
        return f"{base.hostname} is out of reach: {error}"
    return None


def choose_mode(mode: WandbMode) -> WandbMode:
    """``online``, ``offline`` or ``disabled``; says in a line why a run that was to be online is not."""
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        if wanted in ("offline", "disabled"):
            return wanted  # type: ignore[return-value]
        mode = "online" if wanted == "online" or has_credentials() else "offline"
    if mode != "online":
        return mode
    if not has_credentials():
        print("W&B: there are no credentials (WANDB_API_KEY, or `wandb login`); logging offline instead.")
        return "offline"
    problem = unreachable()
    if problem is not None:
        print(f"W&B: {problem}; logging offline instead.")
        return "offline"
    return "online"


def make_wandb_logger(
    mode: WandbMode,
    folder: Path,
    name: str,
    config: dict[str, Any],
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | None = None,
) -> WandbLogger | None:
    """A logger, or None where it is disabled, this is not rank 0, or W&B cannot start.

    ``auto`` is online with credentials and a network, and offline without; then one line says where the run lies and
    how to sync it. W&B's own variables win over what is given here. A run that is started again keeps its id, which is
    kept in the output directory.

    Args:
        mode: As on the command line.
        folder: The run's output directory.
        name: Of the run.
        config: The recipe.
        group: Of runs that belong together.
        job_type: The command.
        tags: To filter by.
    """
    if rank_zero_only.rank not in (None, 0):
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = choose_mode(mode)
    if mode == "disabled":
        return None
    given = {"WANDB_NAME": name, "WANDB_RUN_GROUP": group, "WANDB_JOB_TYPE": job_type, "WANDB_TAGS": tags}
    name_, group_, job_, tags_ = (None if os.environ.get(key) else value for key, value in given.items())
    options: dict[str, Any] = {
        "name": name_,
        "save_dir": os.environ.get("WANDB_DIR") or str(folder),
        "project": os.environ.get("WANDB_PROJECT", "modiff"),
        "id": os.environ.get("WANDB_RUN_ID") or kept_id(folder),
        "resume": "allow",
        "group": group_,
        "job_type": job_,
        "tags": tags_,
        "config": config,
    }
    for online in (True, False) if mode == "online" else (False,):
        try:
            logger = _start(options, offline=not online)
        except Exception as error:  # whatever W&B raises must not stop a run
            again = "logging offline instead" if online else "metrics go to CSV only"
            print(f"W&B: not available ({type(error).__name__}: {error}); {again}.")
            continue
        if not online:
            where = Path(logger.experiment.dir).parent
            print(f"W&B: offline run in {where}; upload it with: wandb sync {where}")
        return logger
    return None


def _start(options: dict[str, Any], offline: bool) -> WandbLogger:
    import wandb

    Path(options["save_dir"]).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", init_timeout=START_S)
    # The mode is said here too: the logger sets an environment variable, which W&B no longer reads once it was asked
    # for credentials.
    mode = {"mode": "offline"} if offline else {}
    logger = WandbLogger(offline=offline, settings=settings, **mode, **options)
    _ = logger.experiment
    return logger


def kept_id(folder: Path) -> str:
    """The id of the run in an output directory, made where there is none yet."""
    path = folder / ID_FILE
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError):
        found = uuid.uuid4().hex[:8]
        with contextlib.suppress(OSError):
            write_json(path, {"id": found})
        return found


class Guarded:
    """Calls to a logger that may fail: the first failure is said, and the run goes on without.

    Args:
        logger: W&B's, or None: nothing is called then.
        folder: Holds everything that is logged.
    """

    def __init__(self, logger: WandbLogger | None, folder: Path) -> None:
        self.logger, self.folder, self.broken = logger, folder, False

    def __call__(self, work: Callable[[Any], Any]) -> None:
        """Call ``work(run)``, unless an earlier call failed."""
        if self.logger is None or self.broken:
            return
        try:
            work(self.logger.experiment)
        except Exception as error:  # network, quota, a full disk: whatever W&B raises must not stop a run
            self.broken = True
            print(f"W&B: logging failed ({type(error).__name__}: {error}); everything is in {self.folder}.")


def finish_wandb(logger: WandbLogger | None, exit_code: int = 0) -> None:
    """Close the run, so that the next one in this process is a new one; an upload is not waited for without end."""
    if logger is None:
        return
    problem: list[str] = []

    def finish() -> None:
        try:
            logger.experiment.finish(exit_code=exit_code)
        except Exception as error:
            problem.append(f"{type(error).__name__}: {error}")

    where = Path(logger.experiment.dir).parent
    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    # Offline there is no server to wait for: the file on the disk is complete when this ends, however slow the machine.
    thread.join(None if getattr(logger.experiment, "offline", False) else FINISH_S)
    if thread.is_alive():
        print(f"W&B: the upload did not end within {FINISH_S:.0f} s; upload the rest with: wandb sync {where}")
    elif problem:
        print(f"W&B: the run did not close cleanly ({problem[0]}).")
