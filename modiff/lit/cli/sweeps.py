"""W&B's sweep files, read for ``modiff compare``: the same grid of runs without W&B."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from modiff.errors import ConfigError

LIMIT = 64


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Args:
        name: Of its folder and of its row.
        recipe: The recipe file.
        options: Of the command line, after the recipe.
    """

    name: str
    recipe: str
    options: list[str] = field(default_factory=list)


def is_sweep(path: str) -> bool:
    """Whether a file is a sweep of W&B, and not a recipe."""
    return "parameters" in _read(path)


def sweep_arms(path: str) -> list[Arm]:
    """Every run of a sweep over a grid.

    Raises:
        ConfigError: The sweep is not over a grid of values, names no recipe, or has too many runs.
    """
    sweep = _read(path)
    command = [str(part) for part in sweep.get("command", [])]
    if "--config" not in command:
        raise ConfigError(f"{path} is a sweep whose command names no recipe: it needs --config RECIPE.yaml.")
    if sweep.get("method") != "grid":
        raise ConfigError(f"{path} has method {sweep.get('method')!r}; modiff compare runs grids. Use wandb agent.")
    recipe = command[command.index("--config") + 1]
    given = _options(command[command.index("--config") + 2 :])
    values = {name: _values(path, name, entry) for name, entry in sweep["parameters"].items()}
    runs = list(itertools.product(*values.values()))
    if len(runs) > LIMIT:
        raise ConfigError(f"{path} has {len(runs)} runs; modiff compare takes {LIMIT}. Make the grid smaller.")
    arms = []
    for run in runs:
        named = dict(zip(values, run, strict=True))
        varied = [f"{name.rpartition('.')[2]}-{value}" for name, value in named.items() if len(values[name]) > 1]
        label = "_".join([Path(path).stem, *varied]).replace("/", "-")
        arms.append(Arm(label, recipe, [*given, *(f"--{name}={_text(value)}" for name, value in named.items())]))
    return arms


def _options(parts: list[str]) -> list[str]:
    """The options of a command, without W&B's own placeholders."""
    return [part for part in parts if not part.startswith("${")]


def _values(path: str, name: str, entry: Any) -> list[Any]:
    if isinstance(entry, Mapping) and "values" in entry:
        return list(entry["values"])
    if isinstance(entry, Mapping) and "value" in entry:
        return [entry["value"]]
    raise ConfigError(f"{path}: parameter {name} is {entry!r}; modiff compare takes value or values.")


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _read(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # said by whoever reads it as a recipe
    return found if isinstance(found, dict) else {}
