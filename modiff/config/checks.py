"""Checks of single fields, whose messages say what was given and what is allowed; dataclasses from dictionaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from modiff.errors import ConfigError

_Built = TypeVar("_Built")


def build(kind: Callable[..., _Built], values: dict[str, Any]) -> _Built:
    """A dataclass from a mapping of its fields.

    Raises:
        ConfigError: A field is unknown or missing, or the class refuses its value.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = [f.name for f in fields]
    name = getattr(kind, "__name__", "")
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no field {unknown[0]!r}; allowed are {', '.join(known)}.")
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise ConfigError(f"{name} needs the field {missing[0]!r}. Set it.")
    return kind(**values)


def side(name: str, value: object, kind: type, allow_inherit: bool = False) -> None:
    """Refuse what is neither a ``kind`` nor None (nor ``"inherit"``)."""
    if value is None or isinstance(value, kind) or (allow_inherit and isinstance(value, str) and value == "inherit"):
        return
    inherit = ", 'inherit'" if allow_inherit else ""
    raise ConfigError(f"{name} is {shown(value)}; allowed are a {kind.__name__}{inherit} or None.")


def shown(value: object) -> str:
    """A value in a message: long ones are cut, for numbers of thousands of digits cannot even be printed.

    >>> shown(5), shown("x" * 300)[-3:], shown(10**5000)
    ('5', '...', 'a number of more than 300 digits')
    """
    if isinstance(value, int) and value.bit_length() > 1000:
        return "a number of more than 300 digits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def member(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse what is none of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} is {shown(value)}; allowed are {', '.join(allowed)}.")


def boolean(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {shown(value)}; allowed are true and false.")


def integer(name: str, value: object, low: int, high: int | None = None, hint: str = "") -> None:
    """Refuse what is no whole number from ``low`` to ``high``; the message ends with ``hint``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ConfigError(f"{name} is {shown(value)}; allowed are whole numbers, {allowed}{hint}.")
