"""The cache of finished calibrations and of measured real images: its folder, its keys and its locks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import modiff
from modiff.lit.runs.directory import digest


def cache_folder() -> Path:
    """Where calibrations are kept: ``$MODIFF_CACHE``, else ``modiff`` in the user's cache directory."""
    given = os.environ.get("MODIFF_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modiff"


def code_version() -> str:
    """Hash of the source that a calibration depends on, and of PyTorch's version: other code may find other weights."""
    root = Path(modiff.__file__).parent
    found = hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] != "lit" or str(name) in ("lit/modules/student.py", "lit/callbacks/calibration.py"):
            found.update(name.as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def calibration_key(parts: dict[str, Any]) -> str:
    """Content hash of a calibration: the same parts and the same code have the same result."""
    return digest({**parts, "code": code_version()})


@contextmanager
def locked(folder: Path, say: Any = print) -> Iterator[None]:
    """Hold a folder, so that two processes do not write one calibration; freed by the system when a process dies.

    Args:
        folder: Made where it is missing.
        say: Called with one line where another process holds it; the wait begins then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: there, do not start one calibration twice at a time
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is at this calibration ({folder}); waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
