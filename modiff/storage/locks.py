"""Locks between processes, which the system frees when a process dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def locked(folder: Path, wait: Callable[[], Any]) -> Iterator[None]:
    """Hold a folder, so that two processes do not write it at once.

    Args:
        folder: Made where it is missing.
        wait: Called once where another process holds the folder, before the wait for it begins.

    Raises:
        OSError: The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
