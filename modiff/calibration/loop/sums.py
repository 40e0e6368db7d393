"""Moments over all processes of a calibration: the same bits for any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modiff.calibration.loop.moments import Moments
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.samples import SampleStore
from modiff.operators.quantized import QuantizedOperator

Vectors = dict[str, Tensor]
"""``x`` ``[n, groups, K]`` and ``y`` ``[n, groups, out / groups]``; see :class:`.Moments`."""


class MomentSums:
    """Adds up :class:`.Moments` of several operators.

    A sum of floats depends on the order of its terms. So the vectors travel between processes, not sums of them: each
    operator belongs to one process, which adds up the vectors of all in the order in which a single process would have
    met them. A single process adds them up at once and keeps none.

    Args:
        operators: The student's, by name; they belong to the processes in turn.
        reducer: The processes.
        scratch: A folder for vectors that do not fit in memory.
        memory: Bytes of vectors that are held in memory.
    """

    def __init__(
        self, operators: Mapping[str, QuantizedOperator], reducer: Reducer, scratch: Path, memory: int
    ) -> None:
        self.operators = operators
        self.reducer = reducer
        self.names = list(operators)
        own = self.names[reducer.rank :: reducer.world_size]
        self.moments = {name: Moments.empty(operators[name]) for name in own}
        self._keys: dict[str, list[tuple[int, int]]] = {name: [] for name in self.names}
        self._stores: dict[str, SampleStore] = {}
        if reducer.world_size > 1:
            limit = memory // max(len(self.names), 1)
            self._stores = {n: SampleStore(scratch / str(i), limit, n) for i, n in enumerate(self.names)}

    def add(self, name: str, trajectory: int, x: Tensor, y: Tensor) -> None:
        """Add the vectors of one call of an operator, in a trajectory of this process."""
        if not self._stores:
            self.moments[name].update(x, y)
            return
        self._stores[name].append({"x": x, "y": y})
        self._keys[name].append((trajectory, len(x)))

    def finish(self) -> dict[str, Moments]:
        """Return the moments of the operators that belong to this process.

        Raises:
            CalibrationError: An operator was never called, or its moments are not finite; in all processes.
        """
        try:
            if self._stores:
                for name in self.names:
                    self._exchange(name)
        finally:
            for store in self._stores.values():
                store.close()
        self.reducer.each(self._check)
        return self.moments

    def _exchange(self, name: str) -> None:
        """Give all vectors of an operator to the process that it belongs to."""
        sent = self.reducer.each(lambda: (self._keys[name], self._vectors(name)))
        parts = self.reducer.gather(sent)
        if name not in self.moments:
            return
        calls = [(trajectory, call) for keys, vectors in parts for trajectory, call in _calls(keys, vectors)]
        moments = self.moments[name]
        for _, call in sorted(calls, key=lambda item: item[0]):  # a stable sort keeps the order within a trajectory
            # A clone starts at an aligned address, as in a single process; products may depend on that.
            x, y = (call[key].clone().to(moments.hessian.device) for key in ("x", "y"))
            moments.update(x, y)

    def _vectors(self, name: str) -> Vectors | None:
        store = self._stores[name]
        return store.rows(torch.arange(len(store))) if len(store) else None

    def _check(self) -> None:
        for name, moments in self.moments.items():
            moments.check(name)


def _calls(keys: list[tuple[int, int]], vectors: Vectors | None) -> list[tuple[int, Vectors]]:
    """Divide the vectors of a process by the calls that they are from; name the trajectory of each."""
    if vectors is None:
        return []
    counts = [count for _, count in keys]
    parts = zip(vectors["x"].split(counts), vectors["y"].split(counts), strict=True)
    return [(trajectory, {"x": x, "y": y}) for (trajectory, _), (x, y) in zip(keys, parts, strict=True)]
