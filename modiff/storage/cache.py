"""The cache: what was found once and is kept by the hash of what it depends on."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from modiff.errors import ConfigError


def cache_folder(kind: str, say: Callable[[str], Any] = print) -> Path:
    """Return the folder of one kind of results: ``$MODIFF_CACHE/<kind>``, else ``~/.cache/modiff/<kind>``.

    A cache that cannot be used costs one line, not the run: its results then lie in a folder that is deleted at the
    end of the process.

    Args:
        kind: ``calibrations`` or ``statistics``.
        say: Called with that line, at the first call of this process.
    """
    try:
        root = cache_root()
        (root / kind).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root / kind).close()
    except (OSError, ConfigError) as error:
        reason = f"{error.filename or ''}: {error.strerror}" if isinstance(error, OSError) else str(error)
        folder = _of_this_process(reason, say) / kind
        folder.mkdir(exist_ok=True)
        return folder
    return root / kind


def cache_root() -> Path:
    """Return the cache's folder, whether or not it exists.

    Raises:
        ConfigError: Nothing names it, and the user has no home folder.
    """
    given = os.environ.get("MODIFF_CACHE")
    if given:
        return Path(given)
    user = os.environ.get("XDG_CACHE_HOME")
    if user:
        return Path(user) / "modiff"
    try:
        return Path.home() / ".cache" / "modiff"
    except RuntimeError as error:  # HOME is not set, and the system does not know the user
        raise ConfigError("the user has no home folder") from error


def _of_this_process(reason: str, say: Callable[[str], Any]) -> Path:
    first = not _temporary.cache_info().currsize
    folder = _temporary()
    if first:
        say(f"The cache cannot be used ({reason}): nothing is kept. Set MODIFF_CACHE to a folder that can be written.")
    return folder


@lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="modiff-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
