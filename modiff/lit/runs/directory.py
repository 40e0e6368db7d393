"""The output directory of a run: claimed once, written atomically, resumed by the same run only."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.errors import ConfigError
from modiff.lit.report.result import flatten
from modiff.storage.atomic import write_json
from modiff.storage.hashing import short_hash
from modiff.storage.locks import HOLDER, LOCK, FolderHeld, FolderLock

MARKER, STATUS = "run.json", "status.json"


def job() -> str | None:
    """What the scheduler calls this job, the same when it starts it again; None where there is none."""
    for name in ("MODIFF_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "LSB_JOBID", "PBS_JOBID"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]}"
    return None


def attempt() -> int:
    """How often the scheduler has started this job again."""
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "MODIFF_ATTEMPT")
    return sum(int(os.environ.get(name) or 0) for name in counts if (os.environ.get(name) or "0").isdecimal())


class RunDirectory:
    """One run's directory.

    Args:
        path: The directory; made when it does not exist.
        identity: What makes the run this run; another identity in the same directory is refused.
        overwrite: Delete what another run left there.

    Raises:
        ConfigError: The directory holds another run, or files that no run of modiff wrote.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(path)
        self.hash = short_hash(identity)
        self.marker = self.path / MARKER
        self.resumed = False
        self.identity = identity
        self._facts: dict[str, Any] = {}
        self.name: str | None = None
        self.claimed = False
        self.lock = FolderLock(self.path, f"modiff {identity.get('command', '')}".strip())
        self.check(overwrite)

    def check(self, overwrite: bool) -> None:
        """Refuse a directory that belongs to something else."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file. Give a directory.")
        if not any(True for _ in self.entries()):
            return
        old = self._read_marker()
        if overwrite and old and old.get("job") == job() and old.get("attempt", 0) < attempt():
            overwrite = False  # what lies there was written by this very job, before it was started again
        if old and old.get("hash") == self.hash:
            self.resumed = not overwrite
            self.complete = old.get("status") == "complete"
            if overwrite:
                self._stale = True
            return
        if (overwrite and old) or (old is None and rank_zero_only.rank not in (None, 0)):
            self._stale = True  # a rank that is not 0 may look while rank 0, which decides, claims the directory
            return
        holds = f"another run ({old.get('name', 'unknown')})" if old else "files that are not a run of modiff"
        fix = "add --overwrite true to replace it, or give another --output" if old else "give another --output"
        raise ConfigError(f"--output {self.path} holds {holds}{self._differences(old)}: {fix}.")

    def _differences(self, old: dict[str, Any] | None) -> str:
        """The fields in which the run that lies there differs, as far as its marker says."""
        there = (old or {}).get("identity")
        if not isinstance(there, dict):
            return ""
        mine = flatten(json.loads(json.dumps(self.identity, default=str)))
        theirs = flatten(there)
        fields = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        said = [f"{key} {theirs.get(key)!r} there, {mine.get(key)!r} here" for key in fields[:3]]
        more = f", and {len(fields) - 3} more" if len(fields) > 3 else ""
        return f", which differs in {'; '.join(said)}{more}" if said else ""

    def entries(self) -> Iterator[Path]:
        """What lies in the directory, but for the lock."""
        if self.path.is_dir():
            yield from (entry for entry in self.path.iterdir() if entry.name not in (LOCK, HOLDER))

    complete = False
    _stale = False

    def claim(self, name: str) -> None:
        """Take the directory: lock it, delete what ``--overwrite`` allowed to, write the marker.

        Raises:
            ConfigError: Another process is at work in it.
        """
        try:  # a job that was started again may find its predecessor still on the way out
            self.lock.acquire(wait_s=60.0 if attempt() else 2.0, say=print)
        except FolderHeld as held:
            raise ConfigError(
                f"--output {self.path} is in use: {held} works there. Wait for it, or give another --output."
            ) from held
        if self._stale:
            for entry in list(self.entries()):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        self.name, self.claimed = name, True
        self.mark("running")

    @property
    def status(self) -> str | None:
        """What the marker says: running, interrupted, failed or complete; None where there is none."""
        return (self._read_marker() or {}).get("status")

    def mark(self, status: str) -> None:
        """Write the marker with ``status``: running, interrupted, failed or complete; an end gives the lock back."""
        name = self.name or (self._read_marker() or {}).get("name")  # a rank that is not 0 marks what rank 0 left
        value = {"name": name, "status": status, "hash": self.hash, "identity": self.identity}
        if job() is not None:
            value |= {"job": job(), "attempt": attempt()}
        write_anyway(self.marker, value)
        if status != "running":
            self.report(status=status)
            self.lock.release()

    def report(self, **facts: Any) -> None:
        """Say in ``status.json`` how far the run is; a full disk does not end it here."""
        self._facts |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        now = {
            "status": "running",
            "updated": time.strftime("%FT%T%z"),
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        with contextlib.suppress(OSError):
            write_anyway(self.path / STATUS, {**now, **self._facts})

    def _read_marker(self) -> dict[str, Any] | None:
        return read_marker(self.marker) or None


def write_anyway(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically, or on a full disk where the file lies already: there is room for it."""
    try:
        write_json(path, value)
    except OSError:
        text = json.dumps(value, indent=2) + "\n"
        old = path.stat().st_size if path.exists() else 0
        with open(path, "r+" if old else "w") as file:
            file.write(text.ljust(old))
            file.truncate()


def read_marker(path: Path) -> dict[str, Any]:
    """What a marker holds; empty where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
