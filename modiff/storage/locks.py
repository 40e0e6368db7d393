"""Locks on folders: one process at a time, and a lock that dies with its holder."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from modiff.storage.atomic import UMASK

LOCK, HOLDER = ".lock", ".holder.json"


class FolderHeld(Exception):
    """Another process holds the folder; the message names it."""


class FolderLock:
    """An exclusive lock on a folder, held by the system: it ends with the process, however that ends.

    The two files it needs, ``.lock`` and ``.holder.json``, stay in the folder; they are never deleted, because a
    process that waits for a deleted file would wait for nothing. Nothing here reads a clock of another machine.

    Args:
        folder: Made where it is missing.
        what: What the holder does, for the message to those who come later.
    """

    def __init__(self, folder: str | os.PathLike[str], what: str = "") -> None:
        self.folder = Path(folder)
        self.what = what
        self._lock = FileLock(str(self.folder / LOCK), mode=0o666 & ~UMASK, thread_local=False)

    @property
    def held(self) -> bool:
        """Whether this object holds the folder."""
        return self._lock.is_locked

    def acquire(self, wait_s: float | None = 0.0, say: Callable[[str], Any] | None = None) -> FolderLock:
        """Take the lock.

        Args:
            wait_s: Seconds to wait for another holder; None: as long as it takes.
            say: Called with one line that names the holder, where the wait begins.

        Raises:
            FolderHeld: Another process still holds it then.
            OSError: The folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            if say is not None:
                say(f"{self.holder()} holds {self.folder}; waiting for it.")
            try:
                self._lock.acquire(timeout=-1 if wait_s is None else wait_s, poll_interval=0.1)
            except Timeout:
                raise FolderHeld(self.holder()) from None
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "what": self.what, "since": time.strftime("%F %T")}
        (self.folder / HOLDER).write_text(json.dumps(facts) + "\n")
        return self

    def release(self) -> None:
        """Give the lock back; a lock that is not held stays as it is."""
        self._lock.release()

    def holder(self) -> str:
        """The holder in words, as far as it is known."""
        try:
            facts = json.loads((self.folder / HOLDER).read_text())
            what = f" ({facts['what']})" if facts["what"] else ""
            return f"process {facts['pid']} on {facts['host']}{what}, since {facts['since']},"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __enter__(self) -> FolderLock:
        return self.acquire()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


@contextmanager
def locked(folder: Path, wait: Callable[[], Any]) -> Iterator[None]:
    """Hold a folder, so that two processes do not write it at once.

    Args:
        folder: Made where it is missing.
        wait: Called once where another process holds the folder, before the wait for it begins.

    Raises:
        OSError: The folder cannot be made or written.
    """
    lock = FolderLock(folder).acquire(wait_s=None, say=lambda _: wait())
    try:
        yield
    finally:
        lock.release()
