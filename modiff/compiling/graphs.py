"""Whole evaluations as CUDA graphs: one launch instead of thousands, with the state in memory that stays where it is.

The first evaluation of a trajectory and refreshes run eagerly, as around every compiled region. Of the others, the
first two warm up, the third is recorded, and all later ones are replayed: in this trajectory and in those that follow
with the same shapes, whose state lies in the same memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from typing_extensions import override

from modiff.compiling.regions import CompiledForward, Regions
from modiff.errors import ConfigError
from modiff.operators.quantized import QuantizedOperator
from modiff.student.reuse import reuse_of
from modiff.student.swap import operators
from modiff.trajectory.contexts import DEFAULT
from modiff.trajectory.graphs import capturing
from modiff.trajectory.session import ModulationState, state_of

log = logging.getLogger("modiff")

RECORDINGS = 16
"""Recorded evaluations of one student; each holds memory of its own."""
WARM_UPS = 2
"""Evaluations before one is recorded: kernels are compiled, and libraries choose theirs."""


class Recorder(Protocol):
    """Records what a function launches; :class:`CudaRecorder`, or a stand-in where there is no GPU."""

    def record(self, function: Callable[[], Any]) -> Any:
        """Run and record; returns the function's result, which each replay overwrites."""

    def replay(self) -> None:
        """Do the same again."""


class CudaRecorder:
    """A CUDA graph."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Any]) -> Any:
        """In a memory pool of its own."""
        with torch.cuda.graph(self.graph):
            return function()

    def replay(self) -> None:
        """One launch."""
        self.graph.replay()


@dataclass
class Recording:
    """One recorded evaluation.

    Args:
        warm_ups: Evaluations that ran before it is recorded.
        addresses: Of the state that it works on.
        arguments: Tensors that it reads; the denoiser's are copied into them.
        fixed: Calibrated scales and zero points that it reads; those of each evaluation are copied into them.
        recorder: Replays it; None: not recorded yet.
        output: Overwritten by each replay.
    """

    warm_ups: int = 0
    addresses: tuple[int, ...] = ()
    arguments: list[Tensor] = field(default_factory=list)
    fixed: list[Tensor] = field(default_factory=list)
    recorder: Recorder | None = None
    output: Any = None


class GraphRegions(Regions):
    """A student whose evaluations are replayed as a whole; see :class:`modiff.compiling.regions.Regions`."""

    @override
    def before_evaluation(self, state: ModulationState, arguments: Any) -> None:
        """Also keep the state's memory for the next trajectory."""
        super().before_evaluation(state, arguments)
        if self.ready and state.trajectory is not None and state.trajectory.current.name == DEFAULT:
            state.static = dict(state.trajectory.current.caches)

    @override
    def removed(self, state: ModulationState) -> None:
        """Let go of the memory."""
        super().removed(state)
        state.static = {}


class Graphed:
    """A function of tensors that is recorded and replayed; stands behind :class:`CompiledForward`.

    Args:
        function: The student's forward, eager or compiled.
        regions: Its operators.
        state: Of the student.
        recorder: Makes recorders.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        regions: Regions,
        state: ModulationState,
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        self.function = function
        self.regions = regions
        self.state = state
        self.recorder = recorder
        self.recordings: dict[Any, Recording] = {}
        self.gave_up = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warm up, record or replay."""
        leaves, structure = tree_flatten((args, kwargs))
        device = next((p.device for p in self.regions.modules[0].parameters()), torch.device("cpu"))
        # A graph cannot read from the host; a time step there is a tensor without dims.
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = self._key(leaves, structure)
        if key not in self.recordings and len(self.recordings) == RECORDINGS:
            return self._give_up(args, kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = self.recordings.setdefault(key, Recording())
        fixed = self._fixed()
        if found.recorder is not None and found.addresses != self._addresses():
            found = self.recordings[key] = Recording()
        if found.warm_ups < WARM_UPS:
            found.warm_ups += 1
            with capturing():
                return self.function(*args, **kwargs)
        if found.recorder is None:
            self._record(found, leaves, structure, fixed)
        else:
            torch._foreach_copy_(found.arguments, tensors)
            if fixed:
                torch._foreach_copy_(found.fixed, fixed)
        assert found.recorder is not None
        found.recorder.replay()
        for operator in self.regions.operators.values():
            operator.region.call = len(operator.region.caches)
        return tree_map_only(Tensor, torch.clone, found.output)

    def _give_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run as it is, which one line says."""
        if not self.gave_up:
            log.warning(
                "modiff.compile: %d evaluations are recorded, and this one has other shapes or numbers; it and others "
                "like it are not. Give time steps as tensors: each number is a recording of its own.",
                RECORDINGS,
            )
        self.gave_up = True
        with capturing():
            return self.function(*args, **kwargs)

    def _record(self, found: Recording, leaves: list[Any], structure: Any, fixed: list[Tensor]) -> None:
        """Record on arguments and scales of its own; nothing is computed while a CUDA graph is recorded."""
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        found.arguments = [leaf for leaf in static if isinstance(leaf, Tensor)]
        found.fixed = [tensor.clone() for tensor in fixed]
        found.addresses = self._addresses()
        self._give_fixed(found.fixed)
        args, kwargs = tree_unflatten(static, structure)
        found.recorder = self.recorder()
        with capturing():
            found.output = found.recorder.record(lambda: self.function(*args, **kwargs))
        self._give_fixed(fixed)

    def _key(self, leaves: list[Any], structure: Any) -> Any:
        """What must be the same for a recording to fit: shapes, other arguments, the context, which calls reuse."""
        described = tuple(
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        )
        run = self.state.trajectory
        context = None if run is None else run.current.name
        return described, str(structure), context, tuple((op.in_float, op.region.reuses) for op in self._operators())

    def _operators(self) -> list[QuantizedOperator]:
        return list(self.regions.operators.values())

    def _addresses(self) -> tuple[int, ...]:
        """Where the state lies."""
        found = []
        for operator in self._operators():
            for cache in operator.region.caches:
                grid = cache.grid
                steps = () if grid is None else (grid.step.data_ptr(), grid.center.data_ptr())
                last = () if cache.held.last is None else (cache.held.last.data_ptr(),)
                found += [cache.a_hat.data_ptr(), cache.o_hat.data_ptr(), *steps, *last]
        return tuple(found)

    def _fixed(self) -> list[Tensor]:
        """Calibrated scales and zero points of this evaluation, in the order of the operators."""
        scales = (_fixed_of(operator) for operator in self._operators())
        return [tensor for pair in scales for tensor in pair]

    def _give_fixed(self, tensors: list[Tensor]) -> None:
        rest = iter(tensors)
        for operator in self._operators():
            pair = [next(rest) for _ in _fixed_of(operator)]
            if pair:
                assert operator.region.execution is not None
                execution = operator.region.execution
                fixed = (pair[0], pair[1] if len(pair) > 1 else None)
                operator.region.execution = execution._replace(quantizer=execution.quantizer.at(fixed))


def _fixed_of(operator: QuantizedOperator) -> tuple[Tensor, ...]:
    execution = operator.region.execution
    fixed = None if execution is None else execution.quantizer.fixed
    return () if fixed is None else tuple(tensor for tensor in fixed if tensor is not None)


def require_recordable(student: nn.Module) -> None:
    """Refuse students whose evaluations cannot be CUDA graphs.

    Raises:
        ConfigError: The student is not on a CUDA device, or follows a reuse schedule.
    """
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise ConfigError(f"CUDA graphs need a CUDA device, and the student is on {device}. Move it there first.")
    if reuse_of(state_of(student)) is not None:
        raise ConfigError("A reuse schedule cannot be recorded as a CUDA graph. Compile without cuda_graph.")


def use_graphs(
    student: nn.Module,
    inner: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    recorder: Callable[[], Recorder] = CudaRecorder,
) -> None:
    """Replay a student's evaluations from now on; :func:`modiff.compiling.modes.uncompile` undoes it.

    Args:
        student: On a CUDA device.
        inner: Compiles the forward before it is recorded; None: it is recorded as it runs eagerly.
        recorder: Makes recorders; others than CUDA graphs need no GPU.

    Raises:
        ConfigError: See :func:`require_recordable`.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state = state_of(student)
    state.refuse_inside("recorded")
    if recorder is CudaRecorder:
        require_recordable(student)
    found: Mapping[str, QuantizedOperator] = operators(student)
    regions = GraphRegions([student], found)
    state.listeners.append(regions)

    def graphed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return Graphed(forward if inner is None else inner(forward), regions, state, recorder)

    student.forward = CompiledForward(student, regions, graphed)
