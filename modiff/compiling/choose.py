"""Which parts of a student run in integers, by measured time: small operators are faster in full precision.

What is compared are *chains*: fused blocks, and each operator outside of them. All of them are timed where they stand,
once with every operator in integers and once with none, in trajectories of their own on the inputs of the first call.
They are timed as they run eagerly: graphs have no clocks inside. Where evaluations are replayed as CUDA graphs, what
counts is the time of the device, without that of launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from modiff.compiling.graphs import GraphRegions
from modiff.compiling.regions import Regions
from modiff.errors import ConfigError
from modiff.student.swap import operators
from modiff.trajectory.session import Listener, ModulationState, state_of, trajectory

MARGIN = 1.1
"""A chain runs in integers where full precision takes at least this many times as long."""
EVALUATIONS = 4
"""Timed evaluations; the fastest counts. One more warms up."""
HEAD_START = 10**7
"""Cycles for which a GPU is kept busy before what it is timed at: about 6 ms, longer than a block's launches take."""
Clock = Callable[[Callable[[], Any]], tuple[Any, float]]


class Measured(Listener):
    """Measures at the first call of a student, and then steps aside.

    Args:
        student: Compiled by :func:`modiff.compile`.
        chains: Modules whose operators run alike, by name.
    """

    def __init__(self, student: nn.Module, chains: Mapping[str, nn.Module]) -> None:
        self.student = student
        self.chains = dict(chains)
        self.handle = student.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the student, before that of its state."""
        self.handle.remove()
        choose(self.student, self.chains, args, kwargs)

    @override
    def removed(self, state: ModulationState) -> None:
        """Measure no more."""
        self.handle.remove()


def choose(
    student: nn.Module, chains: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """Time both executions of each chain, and keep the faster one.

    Rank 0 measures; the others are told. An open trajectory is set aside meanwhile.

    Args:
        student: Of which the chains are parts.
        chains: See :class:`Measured`.
        args: Of a call of the student.
        kwargs: Of the same call.

    Returns:
        Names of the operators that run in full precision from now on.
    """
    names: list[str] = []
    if _rank() == 0:
        state = state_of(student)
        aside, state.trajectory = state.trajectory, None
        regions = [listener for listener in state.listeners if isinstance(listener, Regions)]
        try:
            for each in regions:
                each.paused = True
            seconds = {flag: _time(student, chains, args, kwargs, flag) for flag in (False, True)}
        finally:
            state.trajectory = aside
            for each in regions:
                each.paused = False
        slow = {name for name in chains if seconds[True][name] < MARGIN * seconds[False][name]}
        inside = {id(m) for name in slow for m in chains[name].modules()}
        names = [name for name, operator in operators(student).items() if id(operator) in inside]
    names = _from_rank_0(names)
    _mark(student, names)
    return tuple(names)


def use_float(student: nn.Module, names: Sequence[str]) -> None:
    """Run these operators in full precision, all others quantized.

    Args:
        student: Of the operators.
        names: A choice: of :func:`choose`, of a checkpoint, or of another student of the same teacher.

    Raises:
        ConfigError: The student has no such operator.
        TrajectoryError: A trajectory is open.
    """
    state_of(student).refuse_inside("given another choice of operators")
    found = operators(student)
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ConfigError(f"The choice names operator {unknown[0]!r}, which this student does not have.")
    _mark(student, names)


def _mark(student: nn.Module, names: Sequence[str]) -> None:
    for name, operator in operators(student).items():
        operator.in_float = name in names


def in_float(student: nn.Module) -> tuple[str, ...]:
    """Names of the operators that were measured to be faster in full precision."""
    return tuple(name for name, operator in operators(student).items() if operator.in_float)


def chains_of(student: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Fused blocks, and each quantized operator outside of them, by name."""
    names = {id(module): name for name, module in student.named_modules()}
    inside = {id(m) for block in blocks for m in block.modules()}
    # A block inside another one belongs to that one.
    outer = [b for b in blocks if not any(b is not o and any(m is b for m in o.modules()) for o in blocks)]
    alone = {name: operator for name, operator in operators(student).items() if id(operator) not in inside}
    return {**{names[id(block)]: block for block in outer}, **alone}


def _time(
    student: nn.Module, chains: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], floats: bool
) -> dict[str, float]:
    """Seconds of each chain in the fastest evaluation."""
    _mark(student, [*operators(student)] if floats else [])
    best = dict.fromkeys(chains, float("inf"))
    replayed = any(isinstance(listener, GraphRegions) for listener in state_of(student).listeners)
    clock = device_clock if replayed else wall_clock
    with trajectory(student):
        student(*args, **kwargs)
        for _ in range(EVALUATIONS):
            spent = dict.fromkeys(chains, 0.0)
            with _clocks(chains, spent, clock):
                student(*_nudged(args), **kwargs)
            best = {name: min(best[name], spent[name]) for name in chains}
    return best


def _nudged(args: Sequence[Any]) -> list[Any]:
    """New tensors: an input that is the last one's costs nothing."""
    return [x * 1.01 if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1 else x for x in args]


@contextmanager
def _clocks(chains: Mapping[str, nn.Module], spent: dict[str, float], clock: Clock) -> Iterator[None]:
    """Clocks around the forward of each chain."""
    before = {name: vars(module).get("forward") for name, module in chains.items()}
    for name, module in chains.items():
        module.forward = _clocked(module.forward, name, spent, clock)
    try:
        yield
    finally:
        for name, module in chains.items():
            vars(module).pop("forward")
            if before[name] is not None:
                module.forward = before[name]  # type: ignore[assignment]


def _clocked(forward: Callable[..., Any], name: str, spent: dict[str, float], clock: Clock) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        found, seconds = clock(lambda: forward(*args, **kwargs))
        spent[name] += seconds
        return found

    return run


def wall_clock(run: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and seconds until a GPU has done what it was told to."""
    start = _now()
    found = run()
    return found, _now() - start


def device_clock(run: Callable[[], Any]) -> tuple[Any, float]:
    """A result, and the device's own seconds: it is kept busy until the host has launched what is timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    found = run()
    end.record()
    end.synchronize()
    return found, start.elapsed_time(end) / 1000


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


def _from_rank_0(names: list[str]) -> list[str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return names
    box: list[Any] = [names]
    torch.distributed.broadcast_object_list(box, src=0)
    found: list[str] = box[0]
    return found


def shares(student: nn.Module, multiply_accumulates: Mapping[str, int]) -> float:
    """Share of the multiply-accumulates of quantized operators that run in integers."""
    total = sum(multiply_accumulates.values())
    found = operators(student)
    ours = sum(count for name, count in multiply_accumulates.items() if name in found and not found[name].in_float)
    return ours / total if total else 0.0
