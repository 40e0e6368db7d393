"""Building the C++ operators: what goes wrong costs one line and speed, never a result."""

import logging
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from modiff.kernels.cpp import build

ABSENT = build.problem() is not None
COMPILER = None if ABSENT else build.find_compiler()
TRY = """
import logging
logging.basicConfig(format="%(message)s")
import torch, modiff
from modiff.kernels.cpp import build
from modiff.compiling.modes import compile
from modiff.kernels.backend import BACKENDS
student = modiff.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), modiff.QuantConfig.preset("w8a6-modiff"))
compile(student)
with modiff.trajectory(student):
    for k in range(3):
        out = student(torch.full((2, 8), 1.0 + k))
print(build.problem())
print({row.backend for row in modiff.describe(student)})
"""


def attempt(**env):
    """What one process prints, and says on the error stream."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, env=env, timeout=230)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def fake_compiler(folder, text):
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_without_a_compiler_one_line_says_so_and_onednn_runs(tmp_path):
    (problem, backends), said = attempt(CXX="no-such-compiler", MODIFF_CACHE=tmp_path)
    assert "there is no C++ compiler 'no-such-compiler'" in problem
    assert backends == "{'onednn'}"
    assert said.count("no C++ operators") == 1


def test_a_broken_compiler_is_named(tmp_path, monkeypatch):
    says = 'case "$1" in --version) echo "broken 1.0";; *) echo "error: no memory" >&2; exit 1;; esac'
    path = fake_compiler(tmp_path, says)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path))
    with pytest.raises(build.BuildError, match=rf"the C\+\+ compiler {re.escape(str(path))} fails: .*error"):
        build.load()
    assert not list(tmp_path.glob("cpp/*/building-*"))  # nothing half-made stays


def test_a_compiler_that_does_not_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "exit 3")))
    with pytest.raises(build.BuildError, match="does not run"):
        build.find_compiler()


def test_other_machines_are_told_that_there_is_nothing_for_them(monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(build.BuildError, match="they are for x86-64 CPUs .* not aarch64"):
        build.load()


def test_the_problem_is_found_once(monkeypatch, caplog):
    def fail():
        raise build.BuildError("the moon is full")

    monkeypatch.setattr(build, "load", fail)
    build.problem.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="modiff"):
            assert build.problem() == build.problem() == "the moon is full"
        assert len(caplog.records) == 1
        assert "the moon is full" in caplog.text
        assert "slower" in caplog.text
    finally:
        build.problem.cache_clear()


@pytest.mark.skipif(ABSENT, reason="no C++ operators here")
def test_the_key_changes_with_pytorch_the_compiler_and_the_sources(monkeypatch, tmp_path):
    keys = {build.key(COMPILER), build.key((COMPILER[0], "another version"))}
    monkeypatch.setattr(build.torch, "__version__", "9.9")
    keys.add(build.key(COMPILER))
    monkeypatch.undo()
    (tmp_path / "operators.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    keys.add(build.key(COMPILER))
    assert len(keys) == 4


def cached_library():
    from modiff.storage.cache import cache_folder

    return cache_folder("cpp") / build.key(COMPILER) / build.LIBRARY


@pytest.mark.skipif(ABSENT, reason="no C++ operators here")
def test_a_library_that_does_not_load_is_built_anew_by_one_of_two_processes(tmp_path):
    # The compiler of this test hands out the library that this process has: what is tested is who calls it, and when.
    folder = tmp_path / "bin"
    folder.mkdir()
    link = (
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done; case "$out" in '
        f'*.so) echo x >> {folder}/calls; cp {cached_library()} "$out";; *) : > "$out";; esac'
    )
    path = fake_compiler(folder, f'case "$1" in --version) echo fake;; *) {link};; esac')
    name = build.key((str(path), "fake"))
    broken = tmp_path / "cpp" / name / build.LIBRARY
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"cut short")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: attempt(CXX=path, MODIFF_CACHE=tmp_path), range(2)))
    for (problem, backends), said in found:
        assert (problem, backends) == ("None", "{'cpp'}"), said
    links = (folder / "calls").read_text().count("x")
    assert links == 1  # the second process waited for the first one's library
    (problem, _), _ = attempt(CXX=path, MODIFF_CACHE=tmp_path)
    assert problem == "None"
    assert (folder / "calls").read_text().count("x") == links


def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("MODIFF_CACHE", str(file))
    monkeypatch.setattr(build, "_compile", lambda place, compiler: place / "nothing")
    with pytest.raises(build.BuildError, match="cannot be written|was built but cannot be loaded"):
        build.load()
