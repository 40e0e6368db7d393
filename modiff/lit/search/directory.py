"""The output directory of a search, in which several processes may work at once."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from modiff.errors import ConfigError
from modiff.lit.runs.directory import MARKER, attempt, job, read_marker
from modiff.storage.atomic import write_json
from modiff.storage.locks import FolderHeld, FolderLock

JOURNAL, WORKERS = "study.journal", ".workers"


class SearchDirectory:
    """A directory that is new, empty, or of an earlier search.

    Every process holds a lock of its own below it, so that ``--overwrite`` deletes nothing that another one still
    works on, and so that ``run.json`` says how the search ended only once the last of them has.

    Args:
        path: The directory; made by :meth:`claim`.
        overwrite: Start anew; a job that its scheduler started again goes on all the same.

    Raises:
        ConfigError: It holds something else.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.claimed = False
        own = path / WORKERS / f"{socket.gethostname()}-{os.getpid()}"
        self._lock = FolderLock(own, "modiff search")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--output {path} is a file. Give a directory.")
        if path.exists() and any(path.iterdir()) and not ((path / JOURNAL).exists() or (path / WORKERS).exists()):
            raise ConfigError(f"--output {path} holds files that are not a search. Give another --output.")

    @property
    def status(self) -> str | None:
        """What ``run.json`` says: running, interrupted, failed or complete; None where there is none."""
        return read_marker(self.path / MARKER).get("status")

    def claim(self) -> None:
        """Take part in the search that lies there, or start one.

        Raises:
            ConfigError: It is to be deleted, and another process works on it.
        """
        old = read_marker(self.path / MARKER)
        again = bool(old) and old.get("job") == job() and old.get("attempt", 0) < attempt()
        if self.overwrite and not again and self.path.exists():
            holder = self._another()
            if holder is not None:
                raise ConfigError(
                    f"--output {self.path} is in use: {holder} searches there. Wait for it, or leave --overwrite out: "
                    "searches of the same study share a directory."
                )
            shutil.rmtree(self.path)
        self._lock.acquire()
        self.claimed = True
        self.mark("running")

    def mark(self, status: str) -> None:
        """Write ``run.json``; the end of one of several processes is not that of the search."""
        ended = status != "running"
        if ended:
            self._lock.release()
            shutil.rmtree(self._lock.folder, ignore_errors=True)
        if not (ended and self._another()):
            value = {"name": "search", "command": "search", "status": status}
            write_json(self.path / MARKER, value if job() is None else value | {"job": job(), "attempt": attempt()})

    def _another(self) -> str | None:
        """Another process that works here, in words; locks of processes that are gone are free."""
        for folder in sorted((self.path / WORKERS).glob("*")):
            if folder == self._lock.folder:
                continue
            try:
                FolderLock(folder).acquire().release()
            except FolderHeld as held:
                return str(held)
        return None
