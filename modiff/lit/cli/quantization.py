"""The quantization that recipes and command line ask for together: preset, config, calibration, single fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from modiff.config.quant import QuantConfig
from modiff.errors import ConfigError
from modiff.lit.cli.documents import read_document, read_file
from modiff.lit.modules.calibration_config import CalibrationConfig


class _Nested:
    """One nested field of ``model``, put together from recipes and the command line.

    Args:
        name: The field.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.option = f"--model.{name}"
        self.value: Any = None
        self.source = ""
        self.overrides: list[tuple[list[str], Any]] = []

    def owns(self, key: str) -> bool:
        """Whether an option sets the field, or a field below it."""
        return key == self.option or (key.startswith(f"{self.option}.") and key != f"{self.option}.help")

    def put(self, key: str, value: str) -> None:
        """Take an option of the command line."""
        if key == self.option:
            self.value, self.source = merged(self.value, parsed(value)), "the command line"
        else:
            self.overrides.append((key.removeprefix(f"{self.option}.").split("."), parsed(value)))

    def read(self, model: dict[str, Any], path: str) -> None:
        """Take the value that a recipe's ``model`` gives."""
        if self.name in model:
            self.value, self.source = merged(self.value, model[self.name]), path

    def overridden(self) -> Any:
        """The value with its single fields overridden."""
        value = self.value
        for path, new in self.overrides:
            value = override(value, path, new, f"model.{self.name}")
        return value


def resolve_quantization(args: Sequence[str]) -> tuple[list[str], dict[str, Any] | None, dict[str, Any] | None]:
    """Put together preset, config and calibration, and the single fields that override them.

    jsonargparse passes nulls below ``Optional`` dataclasses on as the word "None", so it gets the finished fields
    instead. A preset expands before its fields are overridden; recipes later in the list win over earlier ones.

    Args:
        args: The command line.

    Returns:
        The command line without ``--model.preset``, ``--model.config...`` and ``--model.calibration...``, the fields of
        the ``QuantConfig`` (None: no quantization) and those of the ``CalibrationConfig`` (None: no calibration).

    Raises:
        ConfigError: A preset and a config are both given, a file is not a recipe, or a field or value is wrong.
    """
    rest: list[str] = []
    preset: str | None = None
    config, calibration = _Nested("config"), _Nested("calibration")
    tokens = list(args)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.partition("=")
        owner = next((field for field in (config, calibration) if field.owns(key)), None)
        if owner is None and key not in ("--model.preset", "--config", "-c"):
            rest.append(token)
            continue
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                raise ConfigError(f"{key} is given without a value. Give one: {key}=VALUE.")
            value = tokens.pop(0)
        if owner is not None:
            owner.put(key, value)
        elif key == "--model.preset":
            preset = parsed(value)
        else:
            rest += [key, value]
            model = read_file(value).get("model")
            if isinstance(model, dict):
                preset = model.get("preset", preset)
                config.read(model, value)
                calibration.read(model, value)
    if preset is not None and config.value is not None:
        raise ConfigError(f"preset {preset!r} and a config (in {config.source}) are both given. Remove one of them.")
    if preset is not None:
        config.value = dataclasses.asdict(QuantConfig.preset(preset))
    return rest, checked(config.overridden()), checked_calibration(calibration.overridden())


def checked(config: Any) -> dict[str, Any] | None:
    """Fill in and validate every field; an error says which field is wrong."""
    if config is None:
        return None
    try:
        return dataclasses.asdict(QuantConfig.from_dict(config))
    except ConfigError as error:
        message = re.sub(r"^(weight|activation|modulation|rules\[\d+\]): ", r".\1: ", str(error))
        raise ConfigError(f"model.config{'' if message != str(error) else ': '}{message}") from None


def checked_calibration(values: Any) -> dict[str, Any] | None:
    """Fill in and validate every field of a ``CalibrationConfig``."""
    if values is None:
        return None
    try:
        return dataclasses.asdict(CalibrationConfig.from_dict(values))
    except ConfigError as error:
        raise ConfigError(f"model.calibration: {error}") from None


def merged(old: Any, new: Any) -> Any:
    """``new`` over ``old``; mappings field by field, everything else as a whole.

    >>> merged({"weight": {"bits": 8}, "activation": None}, {"weight": {"clip": 0.9}})
    {'weight': {'bits': 8, 'clip': 0.9}, 'activation': None}
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def override(config: Any, path: list[str], value: Any, where: str = "model.config") -> dict[str, Any]:
    """``config`` with the field at ``path`` set; missing parents are made.

    >>> override({"activation": None}, ["activation", "bits"], 4)
    {'activation': {'bits': 4}}

    Raises:
        ConfigError: The path leads through something that has no fields.
    """
    if config is not None and not isinstance(config, dict):
        raise ConfigError(
            f"{where} has no field {'.'.join(path)!r} to override: a value or list stands above it. "
            "Write it into a recipe."
        )
    config = dict(config or {})
    config[path[0]] = value if len(path) == 1 else override(config.get(path[0]), path[1:], value, where)
    return config


def parsed(text: str) -> Any:
    """A value of the command line, read as YAML.

    >>> parsed("null"), parsed("None"), parsed("4"), parsed("1e-3"), parsed("full"), parsed("{bits: 4}")
    (None, None, 4, 0.001, 'full', {'bits': 4})
    """
    if text == "None":
        return None
    try:
        value = read_document(text, "The command line")
    except ConfigError as error:
        if "is not YAML" in str(error):
            return text
        raise
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):  # YAML 1.1 wants a dot
        return float(value)
    return value
