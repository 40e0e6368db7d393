"""The settings among which a search chooses, and one of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from modiff.config.quant import QuantConfig
from modiff.config.schedule import ReuseSchedule
from modiff.config.specs import Granularity, Scales
from modiff.errors import ConfigError
from modiff.lit.search.goals import DISTANCES, Quality
from modiff.teachers.sampling.schedulers import STOCHASTIC

FULL = 32
PRESET = "preset"


@dataclass(frozen=True)
class Setting:
    """One way to draw images: sampler, quantization, reuse of blocks, compilation.

    Args:
        sampler: A name of :data:`modiff.teachers.sampling.schedulers.SAMPLERS`.
        steps: Of the sampler.
        weight_bits: 2 to 8, or 32: full precision.
        activation_bits: 2 to 8, or 32: full precision.
        method: ``modiff`` or ``ptq``.
        granularity: Of activations; ``preset``: as the preset says.
        scales: Of activations, ``real`` or ``power_of_two``; ``preset``: as the preset says.
        schedule: A name of :meth:`modiff.config.schedule.ReuseSchedule.preset`; ``none``: every block is computed.
        compile: Whether the student is compiled.
    """

    sampler: str
    steps: int
    weight_bits: int = FULL
    activation_bits: int = FULL
    method: str = "modiff"
    granularity: str = PRESET
    scales: str = PRESET
    schedule: str = "none"
    compile: bool = False

    def canonical(self) -> Setting:
        """The same setting with every field that has no effect at its default: equal settings compare equal.

        >>> Setting("ddim", 20, activation_bits=32, method="ptq").canonical() == Setting("ddim", 20).canonical()
        True
        """
        changes: dict[str, Any] = {}
        if self.activation_bits == FULL:
            changes.update(method="modiff", granularity=PRESET, scales=PRESET)
        return dataclasses.replace(self, **changes)

    def config(self) -> QuantConfig | None:
        """The quantization; None where the teacher itself is used.

        Raises:
            ConfigError: The fields do not fit together, such as a granularity that does not exist.
        """
        if self.weight_bits == FULL and self.activation_bits == FULL and self.schedule == "none":
            return None
        config = QuantConfig.preset(f"w{self.weight_bits}a{self.activation_bits}-{self.method}")
        changes: Any = {k: getattr(self, k) for k in ("granularity", "scales") if getattr(self, k) != PRESET}
        if changes and config.activation is not None:
            config = dataclasses.replace(config, activation=dataclasses.replace(config.activation, **changes))
        if self.schedule != "none":
            config = dataclasses.replace(config, schedule=ReuseSchedule.preset(self.schedule))
        return config

    def __str__(self) -> str:
        bits = "full precision"
        if self.weight_bits != FULL or self.activation_bits != FULL:
            bits = f"W{self.weight_bits}A{self.activation_bits} {self.method}"
        extra = [] if self.granularity == PRESET else [f"per {self.granularity}"]
        extra += [] if self.scales == PRESET else [f"{self.scales} scales"]
        extra += [] if self.schedule == "none" else [self.schedule]
        extra += ["compiled"] if self.compile else []
        return ", ".join([f"{self.sampler} {self.steps}", bits, *extra])


@dataclass(frozen=True)
class SearchSpace:
    """What each field of a :class:`Setting` may be.

    Args:
        samplers: Names of samplers; those that add noise are for qualities that are distances.
        steps: Numbers of steps.
        weight_bits: Of 2 to 8, and 32.
        activation_bits: Of 2 to 8, and 32.
        methods: Of ``modiff`` and ``ptq``.
        granularities: Of activations, and ``preset``.
        scales: Of activations: ``real``, ``power_of_two`` and ``preset``.
        schedules: Names of reuse schedules, and ``none``.
        compile: Whether students may be compiled, or must be.

    Raises:
        ConfigError: A list is empty, or a member does not exist.
    """

    samplers: tuple[str, ...] = ("ddim", "dpmpp_2m")
    steps: tuple[int, ...] = (10, 12, 15, 20, 25, 30, 40, 50)
    weight_bits: tuple[int, ...] = (8,)
    activation_bits: tuple[int, ...] = (FULL, 8, 6, 4)
    methods: tuple[str, ...] = ("modiff",)
    granularities: tuple[str, ...] = (PRESET,)
    scales: tuple[str, ...] = (PRESET,)
    schedules: tuple[str, ...] = ("none", "reuse-2", "extrapolate-2", "extrapolate-3")
    compile: tuple[bool, ...] = (False,)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (list, tuple)) or not value:
                raise ConfigError(f"space.{field.name} is {value!r}; give a list of at least one choice.")
            object.__setattr__(self, field.name, tuple(value))
        for name in ("weight_bits", "activation_bits"):
            wrong = [b for b in getattr(self, name) if b != FULL and (isinstance(b, bool) or b not in range(2, 9))]
            if wrong:
                raise ConfigError(f"space.{name} has {wrong[0]!r}; allowed are 2 to 8, and 32 for full precision.")
        wrong = [method for method in self.methods if method not in ("modiff", "ptq")]
        if wrong:
            raise ConfigError(f"space.methods has {wrong[0]!r}; allowed are modiff, ptq.")
        for name, allowed in (("granularities", get_args(Granularity)), ("scales", get_args(Scales))):
            wrong = [value for value in getattr(self, name) if value not in (PRESET, *allowed)]
            if wrong:
                raise ConfigError(f"space.{name} has {wrong[0]!r}; allowed are {', '.join((PRESET, *allowed))}.")
        for steps in self.steps:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ConfigError(f"space.steps has {steps!r}; allowed are whole numbers, 1 or more.")
        for schedule in self.schedules:
            if schedule != "none":
                ReuseSchedule.preset(schedule)

    def check(self, quality: Quality) -> None:
        """Refuse samplers whose images the quality cannot judge.

        Raises:
            ConfigError: A sampler adds noise, and the quality compares image by image.
        """
        noisy = [name for name in self.samplers if name in STOCHASTIC]
        if noisy and quality.name not in DISTANCES:
            raise ConfigError(
                f"space.samplers has {noisy[0]!r}, which adds noise in every step: its images have no converged "
                f"counterpart, and {quality.name} compares image by image. Leave it out, or ask for a distance such as "
                '"fid_to_teacher <= 1".'
            )

    def suggest(self, trial: Any) -> Setting:
        """Ask an Optuna trial for a setting."""
        choices = {
            "sampler": self.samplers,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "method": self.methods,
            "granularity": self.granularities,
            "scales": self.scales,
            "schedule": self.schedules,
            "compile": self.compile,
        }
        steps = sorted(self.steps)
        picked = {name: trial.suggest_categorical(name, list(values)) for name, values in choices.items()}
        return Setting(steps=steps[trial.suggest_int("steps", 0, len(steps) - 1)], **picked)

    def params(self, setting: Setting) -> dict[str, Any]:
        """A setting as the parameters of an Optuna trial; the inverse of :meth:`suggest`."""
        values = dataclasses.asdict(setting)
        return {**values, "steps": sorted(self.steps).index(setting.steps)}

    def corners(self) -> list[Setting]:
        """Settings that every search measures first: those between which the others lie."""
        most, weight, granularity = max(self.steps), max(self.weight_bits), self.granularities[0]
        found = [
            Setting(sampler, most, weight, bits, self.methods[0], granularity, self.scales[0], "none", compiled)
            for sampler in self.samplers
            for bits in dict.fromkeys((max(self.activation_bits), min(self.activation_bits)))
            for compiled in self.compile
        ]
        if self.schedules[-1] != "none":
            found.append(dataclasses.replace(found[0], schedule=self.schedules[-1]))
        return list(dict.fromkeys(found)) if "none" in self.schedules else []
