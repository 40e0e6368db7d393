"""The output directory of a run: claimed once, written atomically, resumed by the same run only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.errors import ConfigError
from modiff.storage.atomic import write_json
from modiff.storage.hashing import short_hash

MARKER = "run.json"


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
        self.check(overwrite)
        self.identity = identity

    def check(self, overwrite: bool) -> None:
        """Refuse a directory that belongs to something else."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--output {self.path} is a file. Give a directory.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        old = self._read_marker()
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
        raise ConfigError(f"--output {self.path} holds {holds}: {fix}.")

    complete = False
    _stale = False

    def claim(self, name: str) -> None:
        """Take the directory: delete what ``--overwrite`` allowed to, write the marker."""
        if self._stale:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.mark("running")

    def mark(self, status: str) -> None:
        """Write the marker with ``status``: running, interrupted or complete."""
        write_json(self.marker, {"name": self.name, "status": status, "hash": self.hash, "identity": self.identity})

    def _read_marker(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.marker.read_text())
        except (OSError, ValueError):
            return None
