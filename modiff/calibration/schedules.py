"""Reuse schedules found from a student's own trajectories: skip what changes least, after SmoothCache."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from modiff.config.quant import QuantConfig
from modiff.config.schedule import ReuseMode, ReuseSchedule
from modiff.errors import CalibrationError, ConfigError
from modiff.student.reuse import BlockReuse, reuse_of
from modiff.student.swap import convert
from modiff.trajectory.session import Listener, ModulationState, state_of

Run = Callable[[nn.Module], Any]
NEVER = 10**9


def calibrate_schedule(
    teacher: nn.Module,
    config: QuantConfig,
    run: Run,
    share: float,
    mode: ReuseMode = "extrapolate",
    longest: int = 1,
    warmup: int = 2,
    cooldown: int = 1,
) -> ReuseSchedule:
    """Find the pairs of block and evaluation whose branches are best stood in for by earlier ones.

    One run records, for each block and evaluation, how far the branch is from what would stand in for it after 1, 2,
    ... skipped evaluations, relative to the block's output. Pairs are then skipped in the order of that error until
    the share is reached. The schedule is fixed, so that images do not depend on the batch they are drawn in.

    Args:
        teacher: A denoiser; a copy of it is quantized, and nothing is changed.
        config: The student whose trajectories are recorded; its schedule says which blocks, if it has one.
        run: ``run(student)`` opens ``modiff.trajectory(student)`` and samples in it, one or more batches.
        share: Share of the pairs of block and evaluation to skip, above 0 and below 1.
        mode: What stands in for a skipped branch.
        longest: Most evaluations in a row that a block is skipped in.
        warmup: First evaluations, in which everything is computed; at least 2.
        cooldown: Last evaluations, in which everything is computed.

    Returns:
        A schedule for trajectories as long as the run's.

    Raises:
        CalibrationError: The run opened no trajectory, its trajectories differ in length, or a branch is NaN or Inf.
        ConfigError: A number is out of range, or so many pairs cannot be skipped.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; allowed are numbers above 0 and below 1, such as 0.5.")
    for name, value, low in (("longest", longest, 1), ("warmup", warmup, 2), ("cooldown", cooldown, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} is {value!r}; allowed are whole numbers, {low} or more.")
    errors, length = record_errors(teacher, config, run, mode, longest)
    skipped = choose_skips(errors, length, share, longest, warmup, cooldown)
    blocks = config.schedule or ReuseSchedule(every=2, mode=mode)
    table = tuple((name, tuple(times)) for name, times in skipped.items())
    return ReuseSchedule(mode=mode, part=blocks.part, warmup=warmup, length=length, skipped=table)


def record_errors(
    teacher: nn.Module, config: QuantConfig, run: Run, mode: ReuseMode, longest: int
) -> tuple[dict[str, Tensor], int]:
    """Errors of what would stand in for each branch.

    Returns:
        For each block, float64 ``[longest, evaluations]``: row ``k - 1`` holds the error in an evaluation that is the
        k-th skipped one in a row, infinite where too few came before; and the number of evaluations.

    Raises:
        CalibrationError: See :func:`calibrate_schedule`.
    """
    asked = config.schedule or ReuseSchedule(every=2, mode=mode)
    plan = dataclasses.replace(
        asked, every=2, skipped=None, threshold=None, mode="extrapolate", warmup=NEVER, cooldown=0, length=None
    )
    shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
    student = convert(copy.deepcopy(teacher, shared), dataclasses.replace(config, schedule=plan), keep_teacher=True)
    state = state_of(student)
    reuse = reuse_of(state)
    assert reuse is not None
    recorder = _Recorder(reuse, mode, longest)
    state.listeners.append(recorder)
    run(student)
    lengths = set(recorder.lengths)
    if not lengths:
        raise CalibrationError("The run opened no trajectory. Let it sample inside `with modiff.trajectory(student):`.")
    if len(lengths) > 1:
        raise CalibrationError(
            f"The run's trajectories have {min(lengths)} to {max(lengths)} evaluations; a reuse schedule is for one "
            "length. Sample with the same number of steps in each."
        )
    found = {name: recorder.mean(name) for name in reuse.blocks}
    bad = next((name for name, values in found.items() if values.isnan().any()), None)
    if bad is not None:
        raise CalibrationError(f"The branch of block {bad!r} holds NaN or Inf. Check the teacher in this dtype.")
    return found, lengths.pop()


def choose_skips(
    errors: dict[str, Tensor], length: int, share: float, longest: int, warmup: int, cooldown: int
) -> dict[str, list[int]]:
    """Take the pairs of least error until the share is reached; no run of a block is longer than ``longest``.

    Args:
        errors: As :func:`record_errors` returns them.
        length: Evaluations.
        share: Of all pairs of block and evaluation.
        longest: Most evaluations in a row.
        warmup: First evaluations that are computed.
        cooldown: Last evaluations that are computed.

    Raises:
        ConfigError: So many pairs cannot be skipped.

    >>> errors = {"a": torch.tensor([[9.0, 9.0, 0.1, 0.2, 0.3]]), "b": torch.tensor([[9.0, 9.0, 0.4, 0.5, 0.6]])}
    >>> choose_skips(errors, 5, share=0.2, longest=1, warmup=2, cooldown=0)
    {'a': [2, 4], 'b': []}
    """
    wanted = math.floor(share * length * len(errors) + 1e-9)
    taken: dict[str, set[int]] = {name: set() for name in errors}
    pairs = sorted(
        (float(values[0, t]), name, t)
        for name, values in errors.items()
        for t in range(warmup, length - cooldown)
        if bool(values[0, t].isfinite())
    )
    count = 0
    # First pass: single skips. Later ones lengthen runs, at the error that the longer run has.
    for depth in range(1, longest + 1):
        for _, name, t in sorted(pairs, key=lambda p: (float(errors[p[1]][depth - 1, p[2]]), p[1], p[2])):
            if count >= wanted:
                break
            if t not in taken[name] and _run_length(taken[name], t) <= depth:
                taken[name].add(t)
                count += 1
    if count < wanted:
        raise ConfigError(
            f"share is {share}, but at most {count / (length * len(errors)):.2f} of the pairs of block and evaluation "
            f"can be skipped with longest={longest}, warmup={warmup} and cooldown={cooldown}. Lower the share, or "
            "allow longer runs."
        )
    return {name: sorted(times) for name, times in taken.items()}


def _run_length(taken: set[int], t: int) -> int:
    """Length of the run that evaluation ``t`` would belong to."""
    first = last = t
    while first - 1 in taken:
        first -= 1
    while last + 1 in taken:
        last += 1
    return last - first + 1


class _Recorder(Listener):
    """Compares each computed branch with what would have stood in for it."""

    def __init__(self, reuse: BlockReuse, mode: ReuseMode, longest: int) -> None:
        self.reuse = reuse
        self.mode = mode
        self.longest = longest
        self.before: dict[str, list[tuple[Tensor, float]]] = {}
        self.rows: dict[str, list[list[float]]] = {name: [] for name in reuse.blocks}
        self.sums: dict[str, Tensor] = {}
        self.lengths: list[int] = []
        self.evaluations = 0

    @override
    def before_evaluation(self, state: ModulationState, arguments: Sequence[Tensor]) -> None:
        """A trajectory may have begun."""
        if state.trajectory is not None and state.evaluation == 0:
            self.before, self.evaluations = {}, 0
            self.rows = {name: [] for name in self.reuse.blocks}

    @override
    def after_evaluation(self, state: ModulationState, output: Any) -> None:
        """Measure the branches of this evaluation, and keep them for the next ones."""
        run = state.trajectory
        assert run is not None
        self.evaluations += 1
        for name in self.reuse.blocks:
            caches = run.current.branches.get(name, [])
            if not caches:
                raise CalibrationError(f"Block {name!r} was not called in evaluation {state.evaluation}.")
            branches, time, number = caches[0].kept[-1]
            branch = next(t for t in branches if isinstance(t, Tensor))
            place = float(number) if time is None else float(time)
            past = self.before.setdefault(name, [])
            self.rows[name].append([self._error(branch, place, past, k) for k in range(1, self.longest + 1)])
            past.append((branch, place))
            del past[: -(self.longest + 1)]

    def _error(self, branch: Tensor, place: float, past: list[tuple[Tensor, float]], k: int) -> float:
        """Error of the stand-in, when the last computed evaluation is ``k`` back."""
        needed = k + 1 if self.mode == "extrapolate" else k
        if len(past) < needed:
            return math.inf
        last, last_place = past[-k]
        guess = last.double()
        if self.mode == "extrapolate":
            first, first_place = past[-k - 1]
            gap = last_place - first_place
            guess = guess + (guess - first.double()) * (0.0 if gap == 0 else (place - last_place) / gap)
        return float((guess - branch.double()).norm() / branch.double().norm().clamp_min(1e-12))

    @override
    def closed(self, state: ModulationState) -> None:
        """Add this trajectory's errors to those of the others."""
        if not self.evaluations:
            return
        self.lengths.append(self.evaluations)
        if self.evaluations == self.lengths[0]:
            for name, rows in self.rows.items():
                values = torch.tensor(rows, dtype=torch.float64).T
                self.sums[name] = self.sums[name] + values if name in self.sums else values
        self.evaluations = 0

    def mean(self, name: str) -> Tensor:
        """Mean over the trajectories, ``[longest, evaluations]``."""
        return self.sums[name] / len(self.lengths)
