"""Builds the C++ operators once on each machine, and loads them; what goes wrong there costs speed, never a result."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from modiff.storage.cache import cache_folder

log = logging.getLogger("modiff")

SOURCE = Path(__file__).parent / "source"
FILES = ("operators.cpp", "avx512.cpp", "avx2.cpp")
FLAGS = ("-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
"""Products and sums are rounded one by one, as the float definition's are: no contraction. PyTorch has OpenMP;
without it at::parallel_for would run on one thread."""
LINKED = ("-fopenmp",)
LIBRARY = "modiff_cpp.so"
PATIENCE = 300
"""Seconds to wait for another process that builds."""


class BuildError(RuntimeError):
    """The operators cannot be built or loaded; the text says why, and ends a sentence."""


@functools.cache
def problem() -> str | None:
    """Why the C++ operators are not there, in words that end a sentence; None where they are, built now if need be.

    It is said once: a warning names the reason, and what runs instead.
    """
    try:
        load()
    except BuildError as error:
        log.warning("modiff: no C++ operators (%s); oneDNN's are used, which are slower.", error)
        return str(error)
    return None


def load() -> None:
    """Load the library, after building it where that was not done yet.

    Raises:
        BuildError: There is no compiler, it fails, the cache cannot be written, or this is no x86 CPU with AVX2.
    """
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform == "win32":
        raise BuildError(f"they are for x86-64 CPUs on Linux and macOS, not {platform.machine()} on {sys.platform}")
    compiler = find_compiler()
    folder = cache_folder("cpp", log.warning) / key(compiler)
    library = folder / LIBRARY
    if not library.is_file() or not _opens(library):
        _build(folder, compiler)
    check()


def find_compiler() -> tuple[str, str]:
    """The C++ compiler and its version.

    Raises:
        BuildError: There is none, or it does not run.
    """
    name = os.environ.get("CXX") or "c++"
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"there is no C++ compiler {name!r}; install one, such as g++")
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {path} does not run: {_first_line(str(error))}") from None
    return path, _first_line(done.stdout)


def key(compiler: tuple[str, str]) -> str:
    """Name of a library: it changes with the sources, PyTorch, Python's platform and the compiler."""
    digest = hashlib.sha256()
    for part in (*FLAGS, torch.__version__, platform.platform(), *compiler):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCE.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check() -> None:
    """Try the operators on the largest codes.

    Raises:
        BuildError: The CPU lacks AVX2, or the sums are not exact.
    """
    if torch.ops.modiff.cpp_isa() == "none":
        raise BuildError("this CPU has no AVX2")
    if not vnni():
        return
    weight = torch.full((17, 64), 127, dtype=torch.int8)
    handle = torch.ops.modiff.cpp_prepare(weight, torch.ones(17), None, [], [], [], 1)
    try:
        codes = torch.full((7, 64), 255, dtype=torch.uint8)  # 127, as 0 is 128
        sums = torch.ops.modiff.cpp_multiply(handle, codes, torch.ones(1), None, 0, 128, *[None] * 4, 1.0, 0)
    finally:
        torch.ops.modiff.cpp_release(handle)
    if not torch.equal(sums, torch.full((7, 17), 127.0 * 127 * 64)):
        raise BuildError("the sums of the compiled operators are wrong on this CPU")


def vnni() -> bool:
    """Whether the products are made here, by AVX512-VNNI; else they are oneDNN's. Only once loaded."""
    return bool(torch.ops.modiff.cpp_isa() == "avx512_vnni")


def _build(folder: Path, compiler: tuple[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock", timeout=PATIENCE):
            library = folder / LIBRARY
            if library.is_file() and _opens(library):  # another process was faster
                return
            with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as place:
                log.info("modiff: compiling the C++ operators (once on this machine; less than 90 s).")
                os.replace(_compile(Path(place), compiler), library)
    except Timeout:
        raise BuildError(f"another process has been building them for {PATIENCE} s; remove {folder}.lock") from None
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error.strerror}; set MODIFF_CACHE to another folder") from None
    if not _opens(library):
        raise BuildError(f"{library} was built but cannot be loaded")


def _compile(place: Path, compiler: tuple[str, str]) -> Path:
    """Compile into a folder of its own, so that a build that was killed leaves no lock behind."""
    from torch.utils import cpp_extension  # importing it takes a second

    with _quiet(compiler[0]):
        try:
            cpp_extension.load(
                "modiff_cpp",
                [str(SOURCE / name) for name in FILES],
                extra_cflags=list(FLAGS),
                extra_ldflags=list(LINKED),
                build_directory=str(place),
                is_python_module=False,
            )
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            text = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise BuildError(f"the C++ compiler {compiler[0]} fails: {_first_line(text[-1])}") from None
    return place / LIBRARY


@contextmanager
def _quiet(compiler: str) -> Iterator[None]:
    """Neither chatter nor warnings; the compiler that was found."""
    before = os.environ.get("CXX")
    os.environ["CXX"] = compiler
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("CXX")
        if before is not None:
            os.environ["CXX"] = before


def _opens(library: Path) -> bool:
    """Whether the library loads; one that does not (cut short, another PyTorch's) is built anew."""
    if hasattr(torch.ops.modiff, "cpp_isa"):
        return True
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops.modiff, "cpp_isa")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no message")[:200]
