"""The result of an evaluation: filled in by callbacks, read by ``metrics.json``, tables, plots, pages and W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from typing_extensions import NotRequired

from modiff.metrics.figures import Figure, Findings, all_figures

NOT_FINITE = "it is not a finite number: images hold NaN or Inf, or values beyond the range of floats"
SOURCES = ("teacher", "student")


class Evaluations(TypedDict, total=False):
    """Denoiser calls of one trajectory: all of them, and those in which every operator quantized its input."""

    total: int
    quantized: int
    reused: int


class CostTotals(TypedDict):
    """Cost of an evaluation of one image, and memory; keys of ``cost`` in ``metrics.json``.

    ``container_gbops_per_evaluation`` counts codes that share a container with exponents at its 8 bits; results of
    earlier versions lack it.
    """

    gbops_per_evaluation: float
    teacher_gbops_per_evaluation: float
    container_gbops_per_evaluation: NotRequired[float]
    other_gbops_per_evaluation: float
    weight_mib: float
    teacher_weight_mib: float
    other_weight_mib: float
    state_mib_per_image: float


class OperatorCost(TypedDict):
    """Cost of one operator; ``constant``: its input is the same in every evaluation, so it is multiplied once."""

    name: str
    macs: float
    weight_bits: int
    activation_bits: int
    gbops: float
    constant: bool
    weight_mib: float
    state_mib: float


class Timing(TypedDict):
    """Median seconds of ``teacher`` and ``student`` per image and evaluation, and their ratio."""

    seconds_per_image_evaluation: dict[str, float] | None
    time_ratio: float | None


class TrajectoryErrorTable(TypedDict):
    """Relative L2 errors at each evaluation: of each operator's output, and of x_t."""

    timesteps: list[int]
    operators: list[str]
    operator_error: list[list[float | None]]
    sample_error: list[float]


NOT_TIMED: Timing = {"seconds_per_image_evaluation": None, "time_ratio": None}


@dataclass
class Result:
    """What one recipe gave.

    Args:
        num_images: Images behind the figures.
        seed: Of the noise.
        findings: Figures of quality, by the dotted keys of ``metrics.json``.
        evaluations: Denoiser calls of a trajectory; None: not counted (yet).
        cost: Totals; None: not counted (yet).
        operators: Cost of each operator.
        timing: Measured times.
        errors: Errors along the trajectory; None: not measured.
        seconds: Wall time of the whole run.
        provenance: Recipe, hashes, seed, versions and machine.
    """

    num_images: int = 0
    seed: int = 0
    findings: Findings = field(default_factory=Findings)
    evaluations: Evaluations | None = None
    cost: CostTotals | None = None
    operators: list[OperatorCost] = field(default_factory=list)
    timing: Timing = field(default_factory=lambda: Timing(**NOT_TIMED))
    errors: TrajectoryErrorTable | None = None
    seconds: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> float | None:
        """A figure by its dotted key; None where it is null, absent or not finite."""
        number = self.findings.values.get(key)
        return number if number is not None and math.isfinite(number) else None

    def reason(self, key: str) -> str:
        """Why a figure is missing."""
        number = self.findings.values.get(key)
        if number is not None and not math.isfinite(number):
            return NOT_FINITE
        declared = {figure.name: figure.reason for figure in all_figures()}
        return self.findings.reasons.get(key) or declared.get(key.partition(".")[2], "it was not measured")

    def network(self, figure: Figure) -> str | None:
        """Name of the network that a figure was measured with; None: without one."""
        return self.findings.features.get(figure.network) if figure.network else None

    def as_json(self) -> dict[str, Any]:
        """The content of ``metrics.json``: nested objects, nulls kept, a reason for every null."""
        found: dict[str, Any] = {who: {} for who in SOURCES}
        reasons = dict(self.findings.reasons)
        for key in self.findings.values:
            who, _, name = key.partition(".")
            found[who][name] = self.value(key)
            if found[who][name] is None:
                reasons[key] = self.reason(key)
        return {
            **found,
            "features": self.findings.features,
            "reasons": reasons,
            "cost": self.cost,
            "evaluations": self.evaluations,
            "num_images": self.num_images,
            "seconds": self.seconds,
            **self.timing,
            "seed": self.seed,
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """Read the content of a ``metrics.json``, also of an earlier release."""
        values = {f"{who}.{name}": number for who in SOURCES for name, number in content.get(who, {}).items()}
        timing = Timing(**{key: content.get(key) for key in NOT_TIMED})  # type: ignore[typeddict-item]
        return cls(
            num_images=content["num_images"],
            seed=content["seed"],
            findings=Findings(values, dict(content.get("reasons", {})), dict(content.get("features", {}))),
            evaluations=content.get("evaluations"),
            cost=content.get("cost"),
            timing=timing,
            seconds=content.get("seconds"),
            provenance=dict(content.get("provenance", {})),
        )

    def numbers(self) -> dict[str, float]:
        """Every number by its dotted key, for loggers: the keys of CSV files and of W&B."""
        return {k: v for k, v in flatten(self.as_json()).items() if isinstance(v, (int, float))}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted names.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
