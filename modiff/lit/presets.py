"""The quantization that recipes and command line ask for together: preset, config, single fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modiff.config import QuantConfig
from modiff.errors import ConfigError

FIELD = "--model.config."


def resolve_quantization(args: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """Put together preset or config and the single fields that override it.

    jsonargparse passes nulls below ``Optional`` dataclasses on as the word "None", so it gets the finished config
    instead. A preset expands before its fields are overridden; recipes later in the list win over earlier ones.

    Args:
        args: The command line.

    Returns:
        The command line without ``--model.preset`` and ``--model.config...``, and the fields of the ``QuantConfig``;
        None: no quantization.

    Raises:
        ConfigError: A preset and a config are both given, a file is not a recipe, or a field or value is wrong.
    """
    rest: list[str] = []
    preset: str | None = None
    config: dict[str, Any] | None = None
    source, overrides, tokens = "", [], list(args)
    while tokens:
        token = tokens.pop(0)
        key, equals, value = token.partition("=")
        ours = key in ("--model.preset", "--model.config") or key.startswith(FIELD)
        if not ours and key not in ("--config", "-c"):
            rest.append(token)
            continue
        if not equals:
            if not tokens or tokens[0].startswith("--"):
                raise ConfigError(f"{key} is given without a value. Give one: {key}=VALUE.")
            value = tokens.pop(0)
        if not ours:
            rest += [key, value]
            model = read_recipe(value).get("model")
            if isinstance(model, dict):
                preset = model.get("preset", preset)
                if "config" in model:
                    config, source = merged(config, model["config"]), value
        elif key == "--model.preset":
            preset = parsed(value)
        elif key == "--model.config":
            config, source = merged(config, parsed(value)), "the command line"
        else:
            overrides.append((key.removeprefix(FIELD).split("."), parsed(value)))
    if preset is not None and config is not None:
        raise ConfigError(f"preset {preset!r} and a config (in {source}) are both given. Remove one of them.")
    if preset is not None:
        config = dataclasses.asdict(QuantConfig.preset(preset))
    for path, value in overrides:
        config = override(config, path, value)
    return rest, checked(config)


def checked(config: Any) -> dict[str, Any] | None:
    """Every field filled in and valid; the message says where one is not."""
    if config is None:
        return None
    try:
        return dataclasses.asdict(QuantConfig.from_dict(config))
    except ConfigError as error:
        message = re.sub(r"^(weight|activation|modulation|rules\[\d+\]): ", r".\1: ", str(error))
        raise ConfigError(f"model.config{'' if message != str(error) else ': '}{message}") from None


def merged(old: Any, new: Any) -> Any:
    """``new`` over ``old``; mappings field by field, everything else as a whole.

    >>> merged({"weight": {"bits": 8}, "activation": None}, {"weight": {"clip": 0.9}})
    {'weight': {'bits': 8, 'clip': 0.9}, 'activation': None}
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def override(config: Any, path: list[str], value: Any) -> dict[str, Any]:
    """``config`` with the field at ``path`` set; missing parents are made.

    >>> override({"activation": None}, ["activation", "bits"], 4)
    {'activation': {'bits': 4}}

    Raises:
        ConfigError: The path leads through something that has no fields.
    """
    if config is not None and not isinstance(config, dict):
        raise ConfigError(
            f"model.config has no field {'.'.join(path)!r} to override: a value or list stands above it. "
            "Write it into a recipe."
        )
    config = dict(config or {})
    config[path[0]] = value if len(path) == 1 else override(config.get(path[0]), path[1:], value)
    return config


def parsed(text: str) -> Any:
    """A value of the command line, read as YAML.

    >>> parsed("null"), parsed("None"), parsed("4"), parsed("1e-3"), parsed("full"), parsed("{bits: 4}")
    (None, None, 4, 0.001, 'full', {'bits': 4})
    """
    if text == "None":
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):  # YAML 1.1 wants a dot
        return float(value)
    return value


def read_recipe(path: str) -> dict[str, Any]:
    """The content of a recipe file.

    Raises:
        ConfigError: It does not exist, or is not a mapping in YAML.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config {path} does not exist. Give a recipe, such as recipes/mnist/w8a4_modiff.yaml.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {error}".replace("\n", " ")) from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config {path} is not a recipe: it holds {content!r:.60}. Give a file with fields.")
    return content or {}
