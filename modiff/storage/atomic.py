"""Atomic writes: readers see the whole file or folder, or none of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

UMASK = os.umask(0o022)
"""The mode bits that new files do not get; asked for once, because asking changes them for all threads."""
os.umask(UMASK)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary neighbor of ``path``, flush it to the disk, then rename it to ``path``.

    Args:
        path: The file; its parents are made.
        write: Writes the content to the path that it is given, whose suffix is that of ``path``.

    Raises:
        OSError: The file cannot be written (a full disk, no rights); what was at ``path`` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises:
        OSError: As for :func:`write_file`.
    """
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; nulls are kept, NaN and Inf are refused with a ``ValueError``.

    Raises:
        OSError: As for :func:`write_file`.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary folder beside ``path``, flush its files, then rename it to ``path``.

    What lay at ``path`` is deleted last, and comes back if the rename fails. The caller decides whether it may go.

    Args:
        path: The folder; its parents are made.
        write: Fills the folder that it is given.

    Raises:
        OSError: The folder cannot be written; what was at ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _replace_folder(temporary, path)
    except (SafetensorError, OSError) as error:
        raise _named(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file to the disk before its name changes; give it the mode of any new file.

    Some writers make files that their owner alone may read, with which a group could not go on.
    """
    os.chmod(path, 0o666 & ~UMASK)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.replace(temporary, path)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _named(error: SafetensorError | OSError, path: Path) -> Exception:
    """Return the system's error with the path that the caller knows; safetensors wraps it in one of its own."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, str(path)) if error.errno is not None else error
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(path))
