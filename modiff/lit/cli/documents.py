"""YAML and JSON of users: read with bounds, so that no document hangs the command or ends in a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modiff.errors import ConfigError

DEEPEST, LARGEST, LONGEST = 50, 100_000, 300
"""Levels of a document, values in it with aliases expanded, and digits of a number."""


def read_document(text: str, what: str) -> Any:
    """The content of a document.

    Args:
        text: YAML, of which JSON is a part.
        what: Names it in messages.

    Raises:
        ConfigError: It is not YAML, refers to itself, or is nested too deeply or too large for any recipe.
    """
    if re.search(rf"\d{{{LONGEST},}}", text):
        raise ConfigError(f"{what} holds a number of more than {LONGEST} digits.")
    if _brackets(text) > 2 * DEEPEST:
        raise ConfigError(f"{what} is nested deeper than {DEEPEST} levels.")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{what} is not YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is nested deeper than {DEEPEST} levels.") from error
    _check(content, what)
    return content


def check_arguments(args: Sequence[str]) -> None:
    """Refuse values and recipes of a command line that the parser would choke on.

    Raises:
        ConfigError: One of them is of that kind; files that do not exist are the parser's to refuse.
    """
    before = ""
    for arg in map(str, args):
        key, equals, value = arg.partition("=")
        key, value = (key, value) if equals and key.startswith("--") else (before, arg)
        before = arg
        if value.startswith("-"):
            continue
        if key in ("--config", "-c") and Path(value).is_file():
            read_file(value)
        elif value[:1] in tuple("[{&*") or re.search(rf"\d{{{LONGEST},}}", value):
            try:
                read_document(value, key or "An argument")
            except ConfigError as error:
                if "is not YAML" not in str(error):  # text that only looks like it is the parser's to judge
                    raise


def read_file(path: str | Path) -> dict[str, Any]:
    """The content of a recipe file.

    Raises:
        ConfigError: It does not exist, or is not a mapping in YAML.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ConfigError(f"Recipe {path} {what}. Give a file, such as recipes/mnist/w8a4_modiff.yaml.")
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"Recipe {path} is not YAML: {error}") from error
    content = read_document(text, f"Recipe {path}")
    if content is None:
        raise ConfigError(f"Recipe {path} is empty. Give a file with fields.")
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a recipe: it holds {content!r:.60}. Give a file with fields.")
    return content


def _brackets(text: str) -> int:
    """How deeply brackets are nested, those within quotes among them."""
    depth = deepest = 0
    for char in text:
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth = max(0, depth - 1)
    return deepest


def _check(content: Any, what: str) -> None:
    left = LARGEST
    inside: list[tuple[Any, tuple[int, ...]]] = [(content, ())]
    while inside:
        value, above = inside.pop()
        left -= 1
        if left < 0:
            raise ConfigError(f"{what} holds more than {LARGEST} values once its aliases are expanded.")
        if not isinstance(value, (dict, list)):
            continue
        if id(value) in above:
            raise ConfigError(f"{what} refers to itself by an alias. Write the value out.")
        if len(above) >= DEEPEST:
            raise ConfigError(f"{what} is nested deeper than {DEEPEST} levels.")
        members = value.values() if isinstance(value, dict) else value
        inside += [(member, (*above, id(value))) for member in members]
