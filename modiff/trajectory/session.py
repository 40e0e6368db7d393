"""The state of a student: one trajectory at a time, owned, counted and cleared here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modiff.errors import ConfigError, TrajectoryError
from modiff.trajectory.cache import (
    OUTPUT,
    Context,
    InputIdentity,
    KeptOutput,
    OperatorCache,
    Trajectory,
    first_flag,
    tensors_of,
)

if TYPE_CHECKING:
    from modiff.compiling.regions import Regions
    from modiff.operators.execution import CompiledStages
    from modiff.operators.modulated import ModulatedOperator

__all__ = ["OUTPUT", "Context", "ModulationState", "OperatorCache", "Trajectory", "state_of", "trajectory"]

ATTRIBUTE = "_modiff_state"


class ModulationState:
    """What the operators of one student share: the open trajectory and the place in it.

    Every forward of the student's root module is one evaluation. An operator that is called several times within one
    evaluation (one weight, several call sites) keeps one cache for each call, in order.
    """

    def __init__(self) -> None:
        self.trajectory: Trajectory | None = None
        self.last: Trajectory | None = None  # the last one that was closed: its counts
        self._calls: dict[str, int] = {}
        self._quantized = [0, 0]
        self._probes: list[tuple[str, Tensor]] = []
        self._changes: list[tuple[str, Tensor]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._leaders: list[tuple[ModulatedOperator, InputIdentity, int]] = []
        self._leading: list[OperatorCache] = []
        self.stages: CompiledStages | None = None
        self.regions: Regions | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copying or pickling is allowed between trajectories only."""
        self.refuse_inside("copied or pickled")
        return ModulationState().__dict__.copy()

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
            raise TrajectoryError(
                "A trajectory is already open on this student; they can be neither nested nor concurrent. "
                "Close it first, or use a deepcopy of the student for each."
            )
        self.trajectory = run
        return run

    def close(self) -> None:
        """End the trajectory and free its state."""
        if self.trajectory is not None:
            self.trajectory.close()
            self.last = self.trajectory
        self.trajectory = None
        if self.regions is not None:
            self.regions.release()
        self._scratch = {}
        self._probes = []
        self._changes = []
        self._drop_codes()

    def begin_evaluation(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the root module."""
        run = self.trajectory
        if run is None:
            if self.regions is not None:
                self.regions.prepare(self, [*tensors_of((args, kwargs))])
            return
        if run.in_evaluation:
            raise TrajectoryError(
                "The previous evaluation of this trajectory did not finish (it raised, or the student calls itself), "
                "so its state is unusable. Start a new trajectory."
            )
        run.begin()
        self._calls = {}
        self._quantized = [0, 0]
        self._probes = []
        self._changes = []
        if self.regions is not None:
            self.regions.prepare(self, [*tensors_of((args, kwargs))])

    def end_evaluation(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the root module.

        Raises:
            TrajectoryError: A modulated operator was called more or less often than in the first evaluation.
        """
        run = self.trajectory
        if run is None:
            return
        here = run.current
        if self.regions is not None:
            self.regions.finish(self, self._calls, self._quantized)
        if here.calls is None:
            here.calls = self._calls
        elif self._calls != here.calls:
            name = next(n for n in {**here.calls, **self._calls} if self._calls.get(n) != here.calls.get(n))
            raise TrajectoryError(
                f"Operator {name!r} was called {self._calls.get(name, 0)} times in evaluation {here.total}{here}, but "
                f"{here.calls.get(name, 0)} times in the first one: its state would go to the wrong call. "
                "Exclude it with Rule(..., skip=True)."
            )
        run.in_evaluation = False
        self._drop_codes()
        here.total += 1
        done, all_ = self._quantized
        here.quantized += int(all_ > 0 and done == all_)
        result = next(tensors_of(output), None)
        if result is not None:
            # What is wrong in an inner operator shows at the next one; only the last one needs this.
            self._probes.append((OUTPUT, result.sum(dtype=torch.promote_types(result.dtype, torch.float32))))
        for found, kept in ((self._probes, run.probes), (self._changes, run.changes)):
            if found:
                device = found[0][1].device
                kept.append(([name for name, _ in found], torch.stack([probe.to(device) for _, probe in found])))

    def _drop_codes(self) -> None:
        for cache in self._leading:
            cache.codes = None
        self._leaders, self._leading = [], []

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
        if run is None or not run.in_evaluation:
            where = "a trajectory" if run is None else "its student"
            raise TrajectoryError(
                f"Modulated operator {name!r} was called outside {where}: it would run without the state of the last "
                "evaluation. Wrap the sampling loop in `with modiff.trajectory(student):` and call the student itself."
            )
        here = run.current
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        if here.total == 0:
            return None
        caches = here.caches.get(name, [])
        if call >= len(caches):
            raise TrajectoryError(
                f"Operator {name!r} is called more often in evaluation {here.total}{here} than in the first one. "
                "Exclude it with Rule(..., skip=True)."
            )
        cache = caches[call]
        shape = cache.a_hat.shape
        if shape != x.shape:
            rows, *rest = shape
            if not (run.guidance_may_end and batched and [2 * x.shape[0], *x.shape[1:]] == [rows, *rest]):
                raise TrajectoryError(
                    f"The input of operator {name!r} has shape {list(x.shape)} in evaluation {here.total}{here}, but "
                    f"had {list(shape)} in the first one. Keep the batch through a trajectory; open a new "
                    "one for another batch. Where guidance in one batch switches off, so that its last half remains: "
                    "modiff.trajectory(student, guidance_may_end=True)."
                )
            cache.keep_last_half()
        return cache

    def peek_cache(self, name: str) -> OperatorCache | None:
        """The cache that the next call of operator ``name`` will get, if there is one."""
        caches = [] if self.trajectory is None else self.trajectory.current.caches.get(name, [])
        call = self._calls.get(name, 0)
        return caches[call] if call < len(caches) else None

    def keep_cache(self, name: str, cache: OperatorCache) -> None:
        """Keep the cache of an operator's call in the first evaluation."""
        assert self.trajectory is not None
        self.trajectory.current.caches.setdefault(name, []).append(cache)

    def find_leader(self, operator: ModulatedOperator, x: Tensor) -> OperatorCache | None:
        """In the first evaluation: the cache of an operator that read this very tensor under the same quantizer.

        Without one, the operator may lead others.
        """
        identity = InputIdentity.of(x)
        if identity is None:
            return None
        for other, source, site in self._leaders:
            if source.matches(x) and operator.shares_with(other):
                return self._cache_of(other.name, site)
        assert self.trajectory is not None
        site = len(self.trajectory.current.caches.get(operator.name, []))
        self._leaders.append((operator, identity, site))
        return None

    def _cache_of(self, name: str, site: int) -> OperatorCache | None:
        assert self.trajectory is not None
        caches = self.trajectory.current.caches.get(name, [])
        return caches[site] if site < len(caches) else None

    def lead(self, cache: OperatorCache) -> None:
        """Have a leader's codes dropped at the end of the evaluation."""
        self._leading.append(cache)

    def note_unchanged(self, name: str, x: Tensor, cache: OperatorCache, quantized: bool) -> None:
        """Record a call that was not computed, because its input ``x`` is the one that ``cache`` was made from.

        PyTorch says so by counting writes; writes that it does not count (``.data``, numpy, kernels of one's own) are
        found by a comparison on the device, which is read when the trajectory closes.
        """
        assert self.trajectory is not None
        skipped = self.trajectory.current.unchanged
        skipped[name] = skipped.get(name, 0) + 1
        self._changes.append((name, torch.ne(x, cache.reconstruction()).any()))
        self._quantized[0] += int(quantized)
        self._quantized[1] += 1

    def note(self, name: str, probe: Tensor, quantized: bool | None) -> None:
        """Record one call of an operator.

        Args:
            name: The operator.
            probe: A scalar that is NaN or Inf where the input holds either.
            quantized: Whether the input was quantized; None for operators that never do.
        """
        if self.trajectory is None:
            return
        self._probes.append((name, probe))
        if quantized is not None:
            self._quantized[0] += int(quantized)
            self._quantized[1] += 1

    def keep_output(self, name: str, _module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Forward hook of a module whose output depends on its input only: an unchanged input gives the same tensor.

        The operators behind it then see that their input is fixed. That the output is the same is checked on the
        device, like the input in :meth:`note_unchanged`.
        """
        run = self.trajectory
        if torch.compiler.is_compiling() or run is None or not run.in_evaluation:
            return None
        if len(args) != 1 or not isinstance(output, Tensor):
            return None
        kept = run.current.outputs.get(name)
        if kept is not None and kept.output.shape == output.shape and kept.holds(args[0]):
            self._changes.append((name, torch.ne(output, kept.output).any()))
            return kept.output
        run.current.outputs[name] = KeptOutput.of(args[0], output)
        return None

    def scratch(self, like: Tensor, dtype: torch.dtype | None = None, index: int = 0) -> Tensor:
        """Uninitialized memory in the shape and strides of a dense tensor, shared by all operators.

        It is valid until the next call; fresh memory for each residual would cost a page fault per 4 KiB.

        Args:
            like: The tensor.
            dtype: Of the memory; None: the tensor's.
            index: Two of the same dtype are told apart by it.
        """
        dtype = dtype or like.dtype
        key = (like.device, dtype, index)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < like.numel():
            with torch.inference_mode(False):
                buffer = torch.empty(like.numel(), dtype=dtype, device=like.device)
            self._scratch[key] = buffer
        return buffer.as_strided(like.shape, like.stride())


def state_of(student: nn.Module) -> ModulationState:
    """The state of a student.

    Raises:
        TrajectoryError: The module is not a student.
    """
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


def context_names(contexts: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of contexts, checked.

    Raises:
        ConfigError: They are not names, each used once.
    """
    if contexts is None:
        return None
    names = () if isinstance(contexts, str) else tuple(contexts)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"contexts is {contexts!r}; give the names of a step's denoiser calls in their order, each once, such as "
            "('uncond', 'cond')."
        )
    return names


@contextmanager
def hold(student: nn.Module, run: Trajectory) -> Iterator[None]:
    """Have ``run`` be the student's trajectory inside; see :func:`trajectory`."""
    state = state_of(student)
    state.open(run)
    try:
        with torch.no_grad():
            yield
    finally:
        state.close()
        probes, run.probes, changes, run.changes = run.probes, [], run.changes, []
    found = first_flag([(names, ~torch.isfinite(probe)) for names, probe in probes])
    if found:
        where = "the student's output" if found[0] == OUTPUT else f"the input of operator {found[0]!r}"
        raise TrajectoryError(
            f"NaN or Inf in {where}, first in evaluation {found[1]} of {run.total} (from 0). "
            "The images of this trajectory are worthless: check the teacher in this dtype, or keep that operator in "
            "full precision by a rule."
        )
    found = first_flag(changes)
    if found:
        raise TrajectoryError(
            f"The input of operator {found[0]!r} was overwritten between evaluations in a way that PyTorch does not "
            "count (through .data, numpy or a kernel of your own), and was taken for unchanged: the images of this "
            "trajectory are wrong. Write to the tensor itself (copy_), or give a new tensor in each evaluation."
        )
