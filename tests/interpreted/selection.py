"""Which cases run by default: the interpreter takes milliseconds for every program of a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest


def crossed(lists: Sequence[Sequence[Any]], chosen: Callable[..., bool]) -> list[Any]:
    """All combinations; those that are not chosen are slow."""
    cases = itertools.product(*lists)
    return [pytest.param(*case, marks=() if chosen(*case) else pytest.mark.slow) for case in cases]
