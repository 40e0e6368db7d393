"""A whole quantization: plain frozen dataclasses, with the same names in Python and YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from modiff.config.checks import build, member, shown, side
from modiff.config.rules import Rule, Split
from modiff.config.specs import Modulation, QuantSpec, check_weight
from modiff.errors import ConfigError

__all__ = ["BACKENDS", "Modulation", "QuantConfig", "QuantSpec", "Rule", "Split"]

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
        backend: ``simulate``: floating point on quantized values, the definition. ``onednn``: integer products on the
            CPU, refused where an operator's could not be exact. ``triton``: integer products on NVIDIA GPUs, likewise
            (``docs/kernels.md``). ``auto``: integers where they are exact, else ``simulate``; :func:`modiff.describe`
            says which, and why.

    Raises:
        ConfigError: A field is wrong.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    modulation: Modulation | None = None
    rules: tuple[Rule, ...] = field(default=())
    splits: tuple[Split, ...] = field(default=())
    smoothed: tuple[str, ...] = field(default=())
    backend: str = "auto"

    def __post_init__(self) -> None:
        side("weight", self.weight, QuantSpec)
        side("activation", self.activation, QuantSpec)
        side("modulation", self.modulation, Modulation)
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

        Weights: per output channel, symmetric. Activations: per sample, dynamic; plain ones asymmetric, residuals
        asymmetric below 6 bits.

        >>> spec = QuantConfig.preset("w8a4-modiff").activation
        >>> spec.bits, spec.granularity, spec.symmetric, spec.range
        (4, 'sample', False, 'dynamic')

        Raises:
            ConfigError: The name is not of that form.
        """
        match = re.fullmatch("w([2-8]|32)a([2-8]|32)-(modiff|ptq)", name) if isinstance(name, str) else None
        if not match:
            raise ConfigError(
                f"unknown preset {shown(name)}; allowed are w{{bits}}a{{bits}}-modiff and w{{bits}}a{{bits}}-ptq "
                "with bits 2 to 8 or 32, for example 'w8a4-modiff'."
            )
        weight, activation = int(match[1]), int(match[2])
        modulated = match[3] == "modiff"
        return cls(
            weight=None if weight == 32 else QuantSpec(weight, "channel"),
            activation=None
            if activation == 32
            else QuantSpec(activation, "sample", symmetric=modulated and activation >= 6),
            modulation=Modulation() if modulated else None,
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
        rules = values.get("rules")
        if isinstance(rules, (list, tuple)):
            values["rules"] = tuple(_build_rule(f"rules[{i}]", rule) for i, rule in enumerate(rules))
        elif rules is None:
            values.pop("rules", None)
        splits = values.get("splits")
        if isinstance(splits, (list, tuple)):
            values["splits"] = tuple(build(Split, s) if isinstance(s, dict) else s for s in splits)
        return build(cls, values)


def _build_rule(where: str, values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    try:
        return build(Rule, _build_sides(values))
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
