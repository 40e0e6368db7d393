"""A whole quantization: plain frozen dataclasses, with the same names in Python and YAML."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from modiff.config.checks import build, member, shown, side
from modiff.config.rules import Rule, Special, Split
from modiff.config.schedule import ReuseSchedule
from modiff.config.specs import Modulation, QuantSpec, check_weight
from modiff.errors import ConfigError

__all__ = ["BACKENDS", "Modulation", "QuantConfig", "QuantSpec", "Rule", "Special", "Split"]

BACKENDS = ["auto", "simulate", "onednn", "cpp", "triton"]
"""Names that ``backend`` allows; a backend that registers itself adds its own."""


@dataclass(frozen=True)
class QuantConfig:
    """A whole quantization: what every Linear and Conv gets, and the exceptions.

    Args:
        weight: Weight spec; None leaves weights in full precision.
        activation: Activation spec; None leaves activations in full precision.
        modulation: How differences are quantized; None: plain quantization of the inputs, the baseline.
        rules: Exceptions by module name; the last match wins, a pattern that matches nothing is an error.
        splits: Operators that are quantized in two halves; see :func:`modiff.calibration.prepare.inputs.find_splits`.
        smoothed: Linears whose input channels are divided by calibrated factors (SmoothQuant); a calibration with
            ``smoothing`` fills it in. Their parts are named ``<name>.inner``.
        vectors: What operators get that read one vector per sample (embeddings of time and class, and their
            projections): few products, but an error there is the same at every place of an image. None: nothing else.
        ends: What the denoiser's first and last operator get, which read the image and write the answer.
        backend: ``simulate``: floating point on quantized values, the definition. ``onednn``: integer products on the
            CPU, refused where an operator's could not be exact. ``triton``: integer products on NVIDIA GPUs, likewise
            (``docs/kernels.md``). ``auto``: integers where they are exact, else ``simulate``; :func:`modiff.describe`
            says which, and why.
        schedule: Blocks that are skipped in some evaluations; None: everything is computed in each.

    Raises:
        ConfigError: A field is wrong.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    modulation: Modulation | None = None
    rules: tuple[Rule, ...] = field(default=())
    splits: tuple[Split, ...] = field(default=())
    smoothed: tuple[str, ...] = field(default=())
    vectors: Special | None = None
    ends: Special | None = None
    backend: str = "auto"
    schedule: ReuseSchedule | None = None

    def __post_init__(self) -> None:
        side("weight", self.weight, QuantSpec)
        side("activation", self.activation, QuantSpec)
        side("modulation", self.modulation, Modulation)
        side("vectors", self.vectors, Special)
        side("ends", self.ends, Special)
        side("schedule", self.schedule, ReuseSchedule)
        if isinstance(self.rules, list):
            object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError(f"rules is {shown(self.rules)}; give a list of Rule.")
        for name, kind in (("splits", Split), ("smoothed", str)):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(isinstance(member, kind) for member in given):
                raise ConfigError(f"{name} is {shown(given)}; give a list of {kind.__name__}.")
            object.__setattr__(self, name, tuple(given))
        for name, names in (("splits", [split.name for split in self.splits]), ("smoothed", list(self.smoothed))):
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise ConfigError(f"{name} names operator {twice!r} twice; each may be named once.")
        member("backend", self.backend, BACKENDS)
        if self.weight is not None:
            check_weight(self.weight)

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """A config by name: ``w{bits}a{bits}-modiff`` or ``-ptq``; bits 2 to 8, or 32 for untouched.

        They are the best known settings at those bits, the same for both arms but for the modulation, and change when
        better ones are measured (CHANGELOG, Numerics). ``w{bits}a{bits}-modiff-paper`` and ``-ptq-paper`` keep the
        paper's protocol: every operator at the named bits, weights per output channel and symmetric, activations per
        sample; plain ones asymmetric, residuals asymmetric below 6 bits.

        >>> spec = QuantConfig.preset("w8a4-modiff").activation
        >>> spec.bits, spec.granularity, spec.scales, spec.symmetric
        (4, 'sample_channel', 'power_of_two', False)
        >>> QuantConfig.preset("w8a4-modiff").vectors.activation.bits
        8
        >>> QuantConfig.preset("w8a4-modiff-paper").activation.granularity
        'sample'

        Raises:
            ConfigError: The name is not of that form.
        """
        form = "w([2-8]|32)a([2-8]|32)-(modiff|ptq)(-paper)?"
        match = re.fullmatch(form, name) if isinstance(name, str) else None
        if not match:
            raise ConfigError(
                f"unknown preset {shown(name)}; allowed are w{{bits}}a{{bits}}-modiff and w{{bits}}a{{bits}}-ptq, each "
                "also with -paper at its end, with bits 2 to 8 or 32, for example 'w8a4-modiff'."
            )
        weight, activation = int(match[1]), int(match[2])
        modulated = match[3] == "modiff"
        modulation = Modulation() if modulated else None
        if match[4]:
            symmetric = modulated and activation >= 6
            return cls(
                weight=None if weight == 32 else QuantSpec(weight, "channel"),
                activation=None if activation == 32 else QuantSpec(activation, "sample", symmetric=symmetric),
                modulation=modulation,
            )
        eight = QuantSpec(8, "channel"), QuantSpec(8, "sample", symmetric=modulated)
        part = Special(
            weight=eight[0] if weight < 8 else "inherit", activation=eight[1] if activation < 8 else "inherit"
        )
        plain = Special() == part
        return cls(
            weight=None if weight == 32 else QuantSpec(weight, "channel", symmetric=weight >= 5),
            activation=_best_activation(activation, modulated),
            modulation=modulation,
            vectors=None if plain else part,
            ends=None if plain else part,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Build from plain dictionaries, as :func:`dataclasses.asdict` writes them.

        Raises:
            ConfigError: A field is unknown, missing or wrong; the message starts with where it stands.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"QuantConfig is {shown(values)}; give a mapping with its fields.")
        values = _build_sides(values)
        if isinstance(values.get("schedule"), dict):
            values["schedule"] = ReuseSchedule.from_dict(values["schedule"])
        rules = values.get("rules")
        if isinstance(rules, (list, tuple)):
            values["rules"] = tuple(_build_part(f"rules[{i}]", Rule, rule) for i, rule in enumerate(rules))
        elif rules is None:
            values.pop("rules", None)
        for key in ("vectors", "ends"):
            if isinstance(values.get(key), dict):
                values[key] = _build_part(key, Special, values[key])
        splits = values.get("splits")
        if isinstance(splits, (list, tuple)):
            values["splits"] = tuple(build(Split, s) if isinstance(s, dict) else s for s in splits)
        return build(cls, values)


def _best_activation(bits: int, modulated: bool) -> QuantSpec | None:
    """The best known activation spec (benchmarks/bits.md)."""
    if bits == 32:
        return None
    if bits >= 6:
        return QuantSpec(bits, "sample", symmetric=modulated and bits > 6)
    clip = 0.8 if bits == 2 and modulated else 1.0
    return QuantSpec(bits, "sample_channel", symmetric=False, clip=clip, scales="power_of_two")


def _build_part(where: str, kind: Callable[..., Any], values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    try:
        return build(kind, _build_sides(values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _build_sides(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for key, kind in (("weight", QuantSpec), ("activation", QuantSpec), ("modulation", Modulation)):
        if isinstance(values.get(key), dict):
            try:
                values[key] = build(kind, values[key])
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None
    return values
