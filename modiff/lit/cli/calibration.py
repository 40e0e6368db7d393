"""What a recipe says of its calibration, and where finished ones are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import modiff
from modiff.calibration import CalibrationSettings
from modiff.calibration.settings import METHODS
from modiff.errors import ConfigError
from modiff.lit.runs.directory import digest

NOISE_STREAM = 2**40
"""Added to the stream of a calibration's noise: far beyond the time steps of any sampler, whose streams begin at 0."""


@dataclass(frozen=True)
class CalibrationConfig(CalibrationSettings):
    """How the student's weights are found: ``model.calibration`` of a recipe, on top of the library's settings.

    Args:
        method: ``nearest``, ``lp``, ``gptq``, ``adaround`` or ``brecq``; see :func:`modiff.calibration.calibrate`.
        num_images: Images drawn with the student for each of its runs; the ranks share them.
        images_per_batch: Images drawn together: one trajectory.
        seed: Of the noise, of what is recorded and of the batches. The noise is never that of the images that are
            drawn with the same seed.

    Raises:
        ConfigError: A field is out of range.
    """

    method: Literal["nearest", "lp", "gptq", "adaround", "brecq"] = "gptq"
    num_images: int = 16
    images_per_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; allowed are {', '.join(METHODS)}.")
        for name, low in (("num_images", 1), ("images_per_batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}; allowed are whole numbers of at least {low}.")

    @property
    def settings(self) -> CalibrationSettings:
        """The library's part."""
        return CalibrationSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CalibrationSettings)})

    @classmethod
    def from_dict(cls, values: Any) -> CalibrationConfig:
        """Build from a plain mapping, as :func:`dataclasses.asdict` writes it.

        Raises:
            ConfigError: A field is unknown or wrong.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"{values!r} is no calibration; give null, or a mapping with {', '.join(known)}.")
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            raise ConfigError(f"there is no field {unknown[0]!r}; allowed are {', '.join(known)}.")
        return cls(**values)


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
        if name.parts[0] != "lit" or str(name) in ("lit/student.py", "lit/calibration.py"):
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
