"""The state of a student: one trajectory at a time, opened, counted and closed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import TrajectoryError
from modiff.trajectory import messages
from modiff.trajectory.cache import OperatorCache
from modiff.trajectory.calls import Call, parameters_of, require_module, tensors_of
from modiff.trajectory.contexts import Context, Trajectory, context_names
from modiff.trajectory.graphs import in_graph, outside
from modiff.trajectory.identity import InputIdentity, KeptOutput
from modiff.trajectory.lending import without_lent
from modiff.trajectory.listeners import Listener
from modiff.trajectory.probes import Probes
from modiff.trajectory.remarks import Remarks
from modiff.trajectory.schedule import SCHEDULE, Answer, Schedule

__all__ = [
    "Context",
    "ModulationState",
    "OperatorCache",
    "Trajectory",
    "context_names",
    "hold",
    "require_module",
    "state_of",
    "tensors_of",
    "trajectory",
]

ATTRIBUTE = "_modiff_state"


class ModulationState:
    """What the operators of one student share: the open trajectory and the place in it.

    Every forward of the student's root module is one evaluation. An operator that is called several times within one
    evaluation (one weight, several call sites) keeps one cache for each call, in order.

    Attributes:
        trajectory: The open one.
        last: The last one that was closed, for its counts.
        listeners: Told about every evaluation.
        stateful: Whether any operator is modulated, and so keeps state between evaluations.
        names: Of all operators.
        called: Operators that were called in the last trajectory, or in this one.
        schedule: Says what each call does.
        calls: Calls of each modulated operator in this evaluation.
        quantized: How many calls quantized their input in this evaluation, and how many could have.
        lent: Memory of each ô that was returned as it is in this evaluation, by the address of its storage.
        static: Caches whose memory the next trajectory uses again, by operator: CUDA graphs hold their addresses.
    """

    def __init__(self) -> None:
        self.trajectory: Trajectory | None = None
        self.last: Trajectory | None = None
        self.listeners: list[Listener] = []
        self.schedule: Schedule = SCHEDULE
        self.stateful = False
        self.names: set[str] = set()
        self.remarks = Remarks()
        self.called: set[str] = set()
        self.calls: dict[str, int] = {}
        self.quantized = [0, 0]
        self.lent, self.static = set[int](), dict[str, list[OperatorCache]]()
        self._leaders: list[tuple[object, InputIdentity, OperatorCache]] = []
        self._leading: list[OperatorCache] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copying or pickling is allowed between trajectories only."""
        self.refuse_inside("copied or pickled")
        kept = ModulationState()
        kept.stateful, kept.names = self.stateful, self.names
        kept.listeners = [listener for listener in self.listeners if listener.copied]
        return kept.__dict__.copy()

    def refuse_inside(self, what: str) -> None:
        """Raise where a trajectory is open.

        Raises:
            TrajectoryError: A trajectory is open.
        """
        if self.trajectory is not None:
            raise TrajectoryError(
                f"The student cannot be {what} inside a trajectory. Leave modiff.trajectory(...) first."
            )

    def refuse_move(self, casts: bool) -> None:
        """Raise where the student may not be moved (or cast): the open trajectory's state would stay behind.

        Raises:
            TrajectoryError: A trajectory is open, and does not allow moves between devices; casts it never allows.
        """
        if casts or self.trajectory is None or not self.trajectory.movable:
            self.refuse_inside("moved or cast")

    def open(self, run: Trajectory) -> Trajectory:
        """Start a trajectory.

        Raises:
            TrajectoryError: Another one is open on this student.
        """
        if self.trajectory is not None:
            raise TrajectoryError(messages.ALREADY_OPEN)
        self.tell("before_trajectory")
        run.stateful = self.stateful
        self.called = set()
        self.trajectory = run
        return run

    def close(self) -> None:
        """End the trajectory and free its state."""
        if self.trajectory is not None:
            self.trajectory.close()
            self.last = self.trajectory
        self.trajectory = None
        self._forget_codes()
        self.tell("closed")

    def tell(self, event: str) -> None:
        """Tell all listeners of an event without details, such as ``before_trajectory`` or ``moved``."""
        for listener in self.listeners:
            getattr(listener, event)(self)

    def begin_evaluation(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root module.

        Raises:
            TrajectoryError: The evaluation before did not finish.
        """
        if torch.compiler.is_compiling():
            outside(self.begin_evaluation, _module, args, kwargs)
            return
        run = self.trajectory
        if run is not None and self.stateful and torch.jit.is_tracing():
            raise TrajectoryError(messages.TRACED)
        if run is not None:
            if run.in_evaluation:
                raise TrajectoryError(
                    "The previous evaluation of this trajectory did not finish (it raised, or the student calls "
                    "itself), so its state is unusable. Start a new trajectory."
                )
            run.begin(Call.of(parameters_of(type(_module)), args, kwargs))  # type: ignore[arg-type]
            run.probes.begin()
            self.calls, self.quantized, self.lent = {}, [0, 0], set()
        if self.listeners:
            arguments = [*tensors_of((args, kwargs))]
            for listener in self.listeners:
                listener.before_evaluation(self, arguments)

    def end_evaluation(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Forward hook of the root module; it copies what is an operator's state, for samplers keep outputs.

        Raises:
            TrajectoryError: A modulated operator was called more or less often than in the first evaluation.
        """
        if torch.compiler.is_compiling():
            return outside(self.end_evaluation, _module, _args, output)
        run = self.trajectory
        if run is None:
            return None
        here = run.current
        for listener in self.listeners:
            listener.after_evaluation(self, output)
        if here.calls is None:
            here.calls = self.calls
        elif self.calls != here.calls:
            name = next(n for n in {**here.calls, **self.calls} if self.calls.get(n) != here.calls.get(n))
            raise TrajectoryError(
                f"Operator {name!r} was called {self.calls.get(name, 0)} times in evaluation {here.total}{here}, but "
                f"{here.calls.get(name, 0)} times in the first one: its state would go to the wrong call. "
                + messages.SKIPPED
            )
        run.in_evaluation = False
        self._forget_codes()
        here.total += 1
        here.quantized += int(self.quantized[1] > 0 and self.quantized[0] == self.quantized[1])
        run.probes.end(next(tensors_of(output), None))
        return without_lent(output, self.lent)

    def _forget_codes(self) -> None:
        """Drop what leaders encoded in this evaluation."""
        for cache in self._leading:
            cache.encoded = cache.encoded_from = None
        self._leaders, self._leading = [], []

    @property
    def evaluation(self) -> int:
        """Evaluations since the current context's warm-up, which is 0; 0 outside of a trajectory."""
        return 0 if self.trajectory is None else self.trajectory.current.age

    def next_cache(self, name: str, x: Tensor, batched: bool) -> OperatorCache | None:
        """The cache of this call of operator ``name``; None in the first evaluation of the current context.

        Args:
            name: The operator.
            x: Its input.
            batched: Dim 0 of the input counts samples.

        Raises:
            TrajectoryError: No trajectory is open, or the input's shape changed.
        """
        run = self.trajectory
        if run is None:
            raise TrajectoryError(messages.outside_of_any(name))
        self._require_evaluation(name)
        here = run.current
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        if here.age == 0:
            return None
        caches = here.caches.get(name, [])
        if call >= len(caches):
            raise TrajectoryError(
                f"Operator {name!r} is called more often in evaluation {here.total}{here} than in the first one. "
                + messages.SKIPPED
            )
        cache = caches[call]
        shape = cache.shape
        if shape != x.shape:
            rows, *rest = shape
            if not (run.guidance_may_end and batched and [2 * x.shape[0], *x.shape[1:]] == [rows, *rest]):
                raise TrajectoryError(messages.other_shape(name, x.shape, shape, f"{here.total}{here}"))
            cache.keep_last_half()
        return cache

    def _require_evaluation(self, name: str) -> None:
        """Refuse a call inside a trajectory that does not come from the student's own forward.

        Raises:
            TrajectoryError: The student itself was not called.
        """
        assert self.trajectory is not None
        if not self.trajectory.in_evaluation:
            raise TrajectoryError(messages.outside_of_student(name))

    def peek_cache(self, name: str) -> OperatorCache | None:
        """The cache that the next call of operator ``name`` will get, if there is one."""
        caches = [] if self.trajectory is None else self.trajectory.current.caches.get(name, [])
        call = self.calls.get(name, 0)
        return caches[call] if call < len(caches) else None

    def keep_cache(self, name: str, cache: OperatorCache) -> None:
        """Keep the cache of an operator's call in the first evaluation."""
        assert self.trajectory is not None
        self.trajectory.current.caches.setdefault(name, []).append(cache)

    def find_leader(self, quantizer: object, x: Tensor) -> OperatorCache | None:
        """In the first evaluation: the cache of an operator that read this very tensor under the same quantizer.

        Args:
            quantizer: Equal for operators that make the same â and codes of the same inputs.
            x: The input.
        """
        for other, source, cache in self._leaders:
            if other == quantizer and source.matches(x):
                return cache
        return None

    def may_lead(self, quantizer: object, x: Tensor, cache: OperatorCache) -> None:
        """Offer a cache to operators that will read the same tensor, see :meth:`find_leader`."""
        identity = InputIdentity.of(x)
        if identity is not None:
            self._leaders.append((quantizer, identity, cache))

    def lead(self, cache: OperatorCache) -> None:
        """Drop what a leader encoded at the end of the evaluation."""
        self._leading.append(cache)

    def note_unchanged(self, name: str, x: Tensor, cache: OperatorCache, quantized: bool) -> None:
        """Record a call that was not computed, because its input ``x`` is the one that ``cache`` was made from.

        PyTorch says so by counting writes; writes that it does not count (``.data``, numpy, kernels of one's own) are
        found by a comparison on the device, which is read when the trajectory closes.
        """
        assert self.trajectory is not None
        self.called.add(name)
        skipped = self.trajectory.current.unchanged
        skipped[name] = skipped.get(name, 0) + 1
        self.trajectory.probes.changes.append((name, torch.ne(x, cache.reconstruction()).any()))
        self.quantized[0] += int(quantized)
        self.quantized[1] += 1

    def note(self, name: str, probe: Tensor, quantized: bool | None) -> None:
        """Record one call of an operator.

        Args:
            name: The operator.
            probe: A scalar that is NaN or Inf where the input holds either.
            quantized: Whether the input was quantized; None for operators that never do.
        """
        if self.trajectory is None:
            return
        self._require_evaluation(name)
        self.called.add(name)
        self.trajectory.probes.inputs.append((name, probe))
        if quantized is not None:
            self.quantized[0] += int(quantized)
            self.quantized[1] += 1

    def keep_output(self, name: str, _module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Forward hook of a module whose output depends on its input only: an unchanged input gives the same tensor.

        The operators behind it then see that their input is constant. That the output is the same is checked on the
        device, like the input in :meth:`note_unchanged`.
        """
        run = self.trajectory
        if in_graph() or run is None or not run.in_evaluation:
            return None
        if len(args) != 1 or not isinstance(output, Tensor):
            return None
        kept = run.current.outputs.get(name)
        if kept is not None and self.schedule.module(kept, args[0], output) is Answer.REUSE:
            run.probes.changes.append((name, torch.ne(output, kept.output).any()))
            return kept.output
        run.current.outputs[name] = KeptOutput.of(args[0], output)
        return None


def state_of(student: nn.Module) -> ModulationState:
    """The state of a student.

    Raises:
        TrajectoryError: The module is not a student.
    """
    require_module(student)
    state = getattr(student, ATTRIBUTE, None)
    if not isinstance(state, ModulationState):
        raise TrajectoryError(
            f"{type(student).__name__} is not a student. Call modiff.quantize(model, config) first, and pass the "
            "module that it returned."
        )
    return state


@contextmanager
def trajectory(
    student: nn.Module, contexts: Sequence[str] | None = None, guidance_may_end: bool = False
) -> Iterator[Trajectory]:
    """One batch of images from noise to image: owns and clears all state; gradients are off inside.

    Each forward of ``student`` inside is one evaluation, the first one the warm-up. Every trajectory starts afresh.

    Guidance in one batch of 2B rows needs nothing. In two calls per step, each call needs a state of its own: name the
    calls by ``contexts``, or one by one with ``run.context(name)`` (:meth:`Trajectory.context`). Each context then
    warms up and refreshes by its own count.

    Args:
        student: What :func:`modiff.quantize` returned.
        contexts: Names for calls that follow each other in this order, over and over; None: one state for all.
        guidance_may_end: Allow the batch to become its own last half, once or more: guidance in one batch of rows
            [unconditional, conditional] that switches off.

    Yields:
        Counts of evaluations, to be read during and after the trajectory.

    Raises:
        ConfigError: ``contexts`` are not names, each used once.
        TrajectoryError: A trajectory is already open; or, when it closes, NaN or Inf was met: the message names the
            first operator and evaluation.
    """
    run = Trajectory(order=context_names(contexts), guidance_may_end=guidance_may_end)
    with hold(student, run):
        yield run


@contextmanager
def hold(student: nn.Module, run: Trajectory) -> Iterator[None]:
    """Make ``run`` the student's trajectory inside; see :func:`trajectory`."""
    state, probes = state_of(student), run.probes
    state.open(run)
    try:
        with torch.no_grad():
            yield
    finally:
        state.close()
        run.probes = Probes()
    probes.check(run.total)
    state.remarks.after(run, state.names, state.called)
