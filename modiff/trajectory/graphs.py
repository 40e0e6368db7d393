"""Whether an operator runs inside a graph: its books are then kept outside, around the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CAPTURING = [False]


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
