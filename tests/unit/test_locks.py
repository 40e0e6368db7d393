"""Locks on folders: exclusive, named, and gone with their holder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modiff.storage.atomic import UMASK, write_file, write_folder
from modiff.storage.locks import HOLDER, LOCK, FolderHeld, FolderLock

HOLD = """
import sys, time
from modiff.storage.locks import FolderLock
lock = FolderLock(sys.argv[1], "a long run").acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "held\n"
        yield job
        job.kill()


def test_holder_is_named_and_the_lock_dies_with_it(other, tmp_path) -> None:
    said: list[str] = []
    with pytest.raises(FolderHeld, match=rf"process {other.pid} on .* \(a long run\), since "):
        FolderLock(tmp_path).acquire(wait_s=0.2, say=said.append)
    assert len(said) == 1
    assert f"process {other.pid} on" in said[0]
    assert said[0].endswith(f"holds {tmp_path}; waiting for it.")
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = FolderLock(tmp_path)
    with lock:
        assert lock.held
        assert f"process {os.getpid()} on" in lock.holder()
    assert not lock.held


def test_two_locks_of_one_process_exclude_each_other(tmp_path) -> None:
    first, second = FolderLock(tmp_path / "new"), FolderLock(tmp_path / "new")
    with first, pytest.raises(FolderHeld):
        second.acquire()
    with second:
        assert second.held


def test_holder_that_left_no_word(tmp_path) -> None:
    with FolderLock(tmp_path):
        (tmp_path / HOLDER).write_text("{")
        with pytest.raises(FolderHeld, match="another process"):
            FolderLock(tmp_path).acquire()


def test_files_have_the_mode_that_the_umask_gives(tmp_path) -> None:
    FolderLock(tmp_path).acquire().release()
    save_file({"x": torch.zeros(2)}, tmp_path / "plain")
    write_file(tmp_path / "whole", lambda path: save_file({"x": torch.zeros(2)}, path))
    write_folder(tmp_path / "folder", lambda path: save_file({"x": torch.zeros(2)}, path / "inside"))
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o600  # what a group could not read
    for name in (LOCK, "whole", "folder/inside"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~UMASK
