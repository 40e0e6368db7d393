"""Files that are whole or absent, content hashes, locks, and a cache that costs a line and not the run."""

import hashlib
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError

from modiff.errors import ConfigError
from modiff.storage import atomic, cache, hashing
from modiff.storage.atomic import write_file, write_folder, write_json, write_text
from modiff.storage.cache import cache_folder, cache_root
from modiff.storage.locks import locked


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def half(path):
    path.write_text("half")
    raise OSError(28, "No space left on device", str(path))


def test_files_are_written_whole_with_their_parents(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    write_json(path, {"x": None})
    assert path.read_text() == '{\n  "x": null\n}\n'
    assert names(path.parent) == ["b.txt"]
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, float("nan"))
    seen = []
    write_file(path, lambda temporary: (seen.append(temporary.suffix), temporary.write_text("")))
    assert seen == [".txt"]  # writers of pictures choose the format by it


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_file(path, half)

    def wrapped(number):
        def write(_):
            raise SafetensorError(f"I/O error: No space left on device (os error {number})")

        return write

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_file(path, wrapped(28))
    assert caught.value.errno == 28
    with pytest.raises(SafetensorError, match="os error none"):
        write_file(path, wrapped("none"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_files_reach_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda number: (done.append("flush"), fsync(number)))
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    write_text(tmp_path / "x", "1")
    write_folder(tmp_path / "f", lambda folder: [(folder / name).write_text(name) for name in "ab"])
    assert done == ["flush", "rename", "flush", "flush", "rename"]


def test_folders_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "f"
    write_folder(path, lambda folder: (folder / "x").write_text("1"))
    with pytest.raises(OSError, match="No space left"):
        write_folder(path, lambda folder: half(folder / "x"))
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", second_fails)
        with pytest.raises(OSError, match="Input/output error"):
            write_folder(path, lambda folder: (folder / "y").write_text("2"))
    assert (path / "x").read_text() == "1"
    write_folder(path, lambda folder: (folder / "y").write_text("2"))
    assert (names(path), names(path.parent)) == (["y"], ["f"])


def test_hashes_are_sha256_of_what_they_say(tmp_path):
    content = bytes(range(256)) * 40
    file = tmp_path / "x"
    file.write_bytes(content)
    assert hashing.hash_file(file) == hashlib.sha256(content).hexdigest()
    assert hashing.hash_files([file, file]) == hashlib.sha256(content * 2).hexdigest()
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3).T  # not contiguous
    expected = hashlib.sha256(bytes([0, 0, 3, 0, 1, 0, 4, 0, 2, 0, 5, 0])).hexdigest()
    assert hashing.hash_tensor(tensor) == hashing.hash_bits([tensor]) == expected
    assert hashing.hash_tensors({"a": tensor}) != hashing.hash_tensors({"b": tensor})
    assert hashing.hash_tensors({"a": tensor}) != hashing.hash_tensors({"a": tensor.reshape(6)})
    assert hashing.short_hash({"b": 1, "a": tmp_path}) == hashing.hash_json({"a": str(tmp_path), "b": 1})[:16]
    assert hashing.hash_tensor(torch.empty(0)) == hashlib.sha256(b"").hexdigest()


def test_files_named_by_their_hash_are_not_read_where_names_are_trusted(tmp_path):
    blob, link = tmp_path / ("a" * 64), tmp_path / "link"
    blob.write_bytes(b"x")
    link.symlink_to(blob)
    assert hashing.hash_files([link], trust_names=True) == hashlib.sha256(blob.name.encode()).hexdigest()
    assert hashing.hash_files([link]) == hashlib.sha256(b"x").hexdigest()


def test_a_second_process_waits_for_the_folder_and_says_so_once(tmp_path):
    said, held = [], threading.Event()

    def other():  # locks are of open files, so a thread that opens the file again stands for another process
        with locked(tmp_path / "f", lambda: said.append(1)):
            held.set()

    with locked(tmp_path / "f", lambda: said.append(2)):
        thread = threading.Thread(target=other)
        thread.start()
        while not said:
            pass
        assert not held.wait(0.3)
    assert held.wait(100)
    thread.join()
    assert said == [1]


def test_a_lock_dies_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from modiff.storage.locks import locked\n"
        "with locked(Path(sys.argv[1]), print): os._exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 3
    said = []
    with locked(tmp_path, lambda: said.append(1)):
        assert not said


@pytest.fixture
def environment(monkeypatch):
    for name in ("MODIFF_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    cache._temporary.cache_clear()
    yield monkeypatch
    cache._temporary.cache_clear()


def test_the_cache_is_where_the_user_says(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "modiff"
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "modiff"
    environment.setenv("MODIFF_CACHE", str(tmp_path / "own"))
    said = []
    assert cache_folder("calibrations", said.append) == tmp_path / "own" / "calibrations"
    assert (names(tmp_path), names(tmp_path / "own"), said) == (["own"], ["calibrations"], [])


def test_no_home_matters_only_where_nothing_else_names_the_cache(environment, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    environment.setattr(cache.Path, "home", nobody)
    environment.setenv("MODIFF_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    environment.delenv("MODIFF_CACHE")
    with pytest.raises(ConfigError, match="the user has no home folder"):
        cache_root()
    said = []
    folders = [cache_folder(kind, said.append) for kind in ("calibrations", "statistics", "calibrations")]
    nothing = "nothing is kept. Set MODIFF_CACHE to a folder that can be written."
    assert said == [f"The cache cannot be used (the user has no home folder): {nothing}"]
    assert folders[0] == folders[2] != folders[1]
    assert stat.S_IMODE(folders[0].parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("broken", ["file", "disk"])
def test_a_cache_that_cannot_be_written_costs_one_line(environment, tmp_path, broken):
    environment.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    if broken == "file":
        (tmp_path / "cache").write_text("")
        reason = "Not a directory"
    else:

        def read_only(**options):
            raise OSError(30, "Read-only file system", str(options["dir"]))

        environment.setattr(cache.tempfile, "TemporaryFile", read_only)
        reason = "Read-only file system"
    said = []
    folder = cache_folder("statistics", said.append)
    (folder / "x").write_text("usable")
    assert cache_folder("statistics", said.append) == folder
    assert len(said) == 1
    assert said[0].startswith(f"The cache cannot be used ({tmp_path / 'cache' / 'statistics'}: {reason}): nothing")
