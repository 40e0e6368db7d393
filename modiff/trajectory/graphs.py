"""Whether an operator runs inside a graph: its books are then kept outside, around the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CAPTURING = [False]
_REASON = (
    "modiff keeps a state between evaluations, outside of graphs. Leave torch.compile out, or compile the student by "
    "modiff.compile(student)"
)


def in_graph() -> bool:
    """Whether ``torch.compile`` traces the operator, or its kernels are recorded as a CUDA graph."""
    return torch.compiler.is_compiling() or _CAPTURING[0]


@contextmanager
def capturing() -> Iterator[None]:
    """Have operators read what was prepared for a graph, as while ``torch.compile`` traces."""
    before, _CAPTURING[0] = _CAPTURING[0], True
    try:
        yield
    finally:
        _CAPTURING[0] = before


@torch.compiler.disable(reason=_REASON)
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function where somebody else's ``torch.compile`` traces: its graph breaks here.

    What the function does then happens in every evaluation, and not only where it was traced. A user who asks for one
    graph (``fullgraph=True``) is told the reason.
    """
    return function(*args, **kwargs)
