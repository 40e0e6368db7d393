"""A recorder that stands for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from modiff.compiling import graphs
from modiff.trajectory.graphs import capturing


class Again:
    """Runs the recorded function again on the tensors that it read, and writes where it wrote."""

    made: list[Any] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def record(self, function: Callable[[], Any]) -> Any:
        # A CUDA graph does not compute while it is recorded: put back what the function changes.
        self.function = function
        self.output: Any = None
        return _Later(self)

    def replay(self) -> None:
        self.replays += 1
        with capturing():
            self.output = self.function()


class _Later:
    """The output of the last replay."""

    def __init__(self, recorder: Again) -> None:
        self.recorder = recorder


def look_outputs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the output of the last replay looked up: a CUDA graph overwrites that of its recording."""
    original = graphs.tree_map_only

    def look_up(kind: type, function: Callable[[Tensor], Tensor], found: Any) -> Any:
        return original(kind, function, found.recorder.output if isinstance(found, _Later) else found)

    monkeypatch.setattr(graphs, "tree_map_only", look_up)
