"""What a search is asked for: a quality to keep, a cost to lower, a time to spend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from modiff.errors import ConfigError

CostName = Literal["time", "gbops", "memory"]
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600}
QUALITIES = {
    "psnr_db": ("PSNR to the converged sampler, dB", ">="),
    "relative_l2": ("relative L2 to the converged sampler", "<="),
    "fid_to_teacher": ("Fréchet distance to the converged sampler's images", "<="),
    "fid": ("Fréchet distance to real images", "<="),
}
"""Measures of quality: their label, and the comparison that makes sense for them."""
DISTANCES = ("fid_to_teacher", "fid")
"""Measures that compare sets of images, so that samplers that add noise have them too."""
COSTS = {
    "time": ("time per image, in evaluations of the full-precision teacher", "evaluations"),
    "gbops": ("bit operations per image", "GBOPs"),
    "memory": ("weights, and state of one image", "MiB"),
}
"""Measures of cost: their label and unit. All are minimized."""


@dataclass(frozen=True)
class Quality:
    """A bound on the images, such as ``psnr_db >= 30``.

    Args:
        name: A key of :data:`QUALITIES`.
        bound: In the measure's unit.
    """

    name: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Quality:
        """Read ``NAME >= NUMBER`` or ``NAME <= NUMBER``.

        Raises:
            ConfigError: The text has another form, the measure does not exist, or the comparison is the wrong way.

        >>> Quality.parse("psnr_db >= 30")
        Quality(name='psnr_db', bound=30.0)
        """
        match = re.fullmatch(r"\s*([a-z0-9_.]+)\s*(>=|<=)\s*(-?[0-9.]+(?:e-?\d+)?)\s*", str(text))
        if match is None:
            raise ConfigError(f'quality is {text!r}; write a measure and a bound, such as "psnr_db >= 30".')
        name, comparison, bound = match.groups()
        if name not in QUALITIES:
            raise ConfigError(f"quality names {name!r}, which does not exist; allowed are {', '.join(QUALITIES)}.")
        wanted = QUALITIES[name][1]
        if comparison != wanted:
            raise ConfigError(f'quality is {text!r}, but {name} is bounded by {wanted}: "{name} {wanted} {bound}".')
        try:
            return cls(name, float(bound))
        except ValueError:
            raise ConfigError(f"quality is {text!r}; {bound!r} is no number. Write such as 30 or 0.1.") from None

    @property
    def maximized(self) -> bool:
        """Whether larger values are better."""
        return QUALITIES[self.name][1] == ">="

    def missing(self, value: float) -> float:
        """How much a value falls short of the bound; 0 or less where it keeps it."""
        return self.bound - value if self.maximized else value - self.bound

    def __str__(self) -> str:
        return f"{self.name} {QUALITIES[self.name][1]} {self.bound:g}"


def parse_cost(name: str) -> CostName:
    """Check the name of a cost.

    Raises:
        ConfigError: There is no such cost.
    """
    if name not in get_args(CostName):
        raise ConfigError(f"cost is {name!r}; allowed are {', '.join(get_args(CostName))}.")
    return name  # type: ignore[return-value]


def parse_budget(text: str | int | float) -> float:
    """Seconds of a duration such as ``20m``, ``90s`` or ``1.5h``; a plain number counts seconds.

    Raises:
        ConfigError: The text is no duration, or not positive.

    >>> parse_budget("20m"), parse_budget("1h30m"), parse_budget(45)
    (1200.0, 5400.0, 45.0)
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", str(text))
    joined = "".join(number + unit for number, unit in parts)
    if re.fullmatch(r"\d+(?:\.\d+)?", str(text).strip()):
        seconds = float(text)
    elif parts and joined == re.sub(r"\s+", "", str(text)):
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    else:
        raise ConfigError(f"budget is {text!r}; write a duration such as 20m, 90s or 1h30m.")
    if seconds <= 0:
        raise ConfigError(f"budget is {text!r}; it must be longer than nothing, such as 20m.")
    return seconds
