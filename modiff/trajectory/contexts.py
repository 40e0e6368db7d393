"""One trajectory from noise to image: the counts and state of each context of its denoiser calls."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from modiff.errors import ConfigError, TrajectoryError
from modiff.trajectory.cache import BranchCache, OperatorCache
from modiff.trajectory.calls import Call
from modiff.trajectory.identity import KeptOutput
from modiff.trajectory.probes import Probes

DEFAULT = ""  # the context of calls that name none


@dataclass
class Context:
    """The state of one of the calls that a step makes: all of them, or those with (or without) the condition.

    Args:
        name: ``""`` where calls name none.
        total: Denoiser calls in this context; its first one is its warm-up.
        quantized: Calls in which every operator that quantizes activations quantized its input.
        caches: By operator, one for each call site.
        calls: Calls of each operator in the first evaluation.
        unchanged: Calls of each operator that were not computed, because the input was the last one's.
        shapes: Shape and dtype of each tensor among the denoiser's arguments in the first evaluation.
        outputs: What modules between a constant input and operators returned for it, by module.
        reused: Calls in which any block was skipped by a reuse schedule.
        branches: What such a schedule keeps, by block, one for each call site.
    """

    name: str
    total: int = 0
    quantized: int = 0
    caches: dict[str, list[OperatorCache]] = field(default_factory=dict, repr=False)
    calls: dict[str, int] | None = field(default=None, repr=False)
    unchanged: dict[str, int] = field(default_factory=dict, repr=False)
    shapes: tuple[object, ...] = field(default=(), repr=False)
    outputs: dict[str, KeptOutput | None] = field(default_factory=dict, repr=False)
    reused: int = 0
    branches: dict[str, list[BranchCache]] = field(default_factory=dict, repr=False)
    start: int = 0
    call: Call | None = field(default=None, repr=False)

    @property
    def age(self) -> int:
        """Calls since its state was begun; 0 in a warm-up."""
        return self.total - self.start

    def begin_again(self) -> None:
        """Forget the state: the next call is a warm-up."""
        self.caches, self.outputs, self.branches = {}, {}, {}
        self.calls, self.start = None, self.total

    def __str__(self) -> str:
        return f" of context {self.name!r}" if self.name else ""


@dataclass(repr=False)
class Trajectory:
    """One trajectory, from noise to image: its counts, and its state while it is open.

    Args:
        order: Contexts of the calls of a step, in their order; None: all calls share one, unless they name theirs.
        guidance_may_end: The batch may become its own last half (guidance in one batch of 2B rows that switches off).
        one_call_per_step: Steps are marked by :meth:`end_step`, and two calls in one need an ``order``.
        movable: Whoever opened the trajectory may move the student between devices (offloading).
    """

    order: tuple[str, ...] | None = None
    guidance_may_end: bool = False
    one_call_per_step: bool = False
    movable: bool = False
    contexts: dict[str, Context] = field(default_factory=dict, repr=False)
    current: Context = field(default_factory=lambda: Context(DEFAULT), repr=False)
    named: str | None = field(default=None, repr=False)
    in_evaluation: bool = field(default=False, repr=False)
    closed: bool = field(default=False, repr=False)
    calls_in_step: int = field(default=0, repr=False)
    taken: list[str] = field(default_factory=list, repr=False)
    last_call: Call | None = field(default=None, repr=False)
    stateful: bool = field(default=True, repr=False)
    timed: bool = field(default=False, repr=False)
    probes: Probes = field(default_factory=Probes, repr=False)

    def __repr__(self) -> str:
        return f"Trajectory(total={self.total}, quantized={self.quantized})"

    @property
    def total(self) -> int:
        """Denoiser calls, in all contexts."""
        return sum(context.total for context in self.contexts.values())

    @property
    def quantized(self) -> int:
        """Calls in which every operator that quantizes activations quantized its input, in all contexts."""
        return sum(context.quantized for context in self.contexts.values())

    @property
    def reused(self) -> int:
        """Calls in which any block was skipped by a reuse schedule, in all contexts."""
        return sum(context.reused for context in self.contexts.values())

    @property
    def branch_bytes(self) -> int:
        """Bytes that a reuse schedule holds in all contexts, for the whole batch."""
        sites = (sites for context in self.contexts.values() for sites in context.branches.values())
        return sum(cache.num_bytes for caches in sites for cache in caches)

    @property
    def caches(self) -> dict[str, list[OperatorCache]]:
        """State of the current context, by operator."""
        return self.current.caches

    @property
    def state_bytes(self) -> int:
        """Bytes held for â and ô by all operators in all contexts, for the whole batch."""
        sites = (sites for context in self.contexts.values() for sites in context.caches.values())
        return sum(cache.num_bytes for caches in sites for cache in caches)

    @property
    def constant(self) -> frozenset[str]:
        """Operators that were computed in the first evaluation of each context only, as their input was constant."""
        longer = [context for context in self.contexts.values() if context.total > 1 and context.calls]
        found = [
            {n for n, skipped in c.unchanged.items() if skipped == (c.calls or {}).get(n, 0) * (c.total - 1)}
            for c in longer
        ]
        return frozenset(set.intersection(*found)) if found else frozenset()

    @contextmanager
    def context(self, name: str) -> Iterator[Context]:
        """Denoiser calls inside have a state of their own: for guidance in two calls per step.

        Each context warms up in its first call, and ``total`` and ``quantized`` are sums over contexts: with full
        warm-up, ``total - quantized`` is the number of contexts (plus refreshes, counted per context).

        Args:
            name: Such as ``"cond"`` and ``"uncond"``.

        Yields:
            The context, with its own ``total`` and ``quantized``.

        Raises:
            ConfigError: The name is not a string, or empty.
            TrajectoryError: The trajectory is closed, or within an evaluation.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"The context is {name!r}; give a name, such as 'cond' or 'uncond'.")
        if self.closed:
            raise TrajectoryError("The trajectory is closed; contexts belong to an open one. Open a new trajectory.")
        if self.in_evaluation:
            raise TrajectoryError(
                f"Context {name!r} was entered within an evaluation; enter it around the call of the student."
            )
        before, self.named = self.named, name
        try:
            yield self._get(name)
        finally:
            self.named = before

    def begin(self, call: Call | None = None) -> None:
        """Start an evaluation: choose its context.

        Args:
            call: Its arguments.

        Raises:
            TrajectoryError: The call would share a state with another one that is conditioned differently.
        """
        if self.named is not None:
            self.current = self._get(self.named)
        else:
            if self.order is not None:
                self.current = self._get(self._next(call))
                self.taken.append(self.current.name)
            else:
                self._refuse_shared_state(call)
                self.current = self._get(DEFAULT)
            self.calls_in_step += 1
        self.last_call = call
        self._grow(call)
        self.current.call = call
        self.in_evaluation = True

    def _same_time(self, call: Call | None) -> bool | None:
        """Whether a call is at the time step of the last one; None where it is not known.

        Values on a device are compared in the first calls only, because that waits for it.
        """
        return None if call is None or self.last_call is None else call.same_time(self.last_call, self.total < 4)

    def _next(self, call: Call | None) -> str:
        """Which of the named calls of a step this one is: the one it was before by its arguments, else the next one."""
        assert self.order is not None
        if len(self.order) == 1:
            return self.order[0]
        same_time = self._same_time(call)
        if same_time and not self.timed:
            self.timed = True
            if self.total > 1 and not self._distinct():
                raise TrajectoryError(self._ambiguous())
            if self.calls_in_step:  # of this step only the last call was made: earlier steps may have left calls out
                self.taken, self.calls_in_step = [self.current.name], 1
        known = self._known(call)
        if (
            same_time is False
            and self.calls_in_step
            and (self.timed or (known and call is not None and call.condition))
        ):
            self.end_step()
        left = [name for name in self.order if name not in self.taken]
        if not left:
            self.taken, left = [], list(self.order)
        seen = [name for name in known if name in left]
        return next(iter([*seen, *(name for name in left if name not in self.contexts), *left]))

    def _known(self, call: Call | None) -> list[str]:
        """Names of calls that had the same arguments but for x_t and the time step."""
        found = {name: context.call for name in self.order or () if (context := self.contexts.get(name)) is not None}
        return [n for n, last in found.items() if call is not None and last is not None and call.same_condition(last)]

    def _distinct(self) -> bool:
        """Whether the named calls differ in their arguments, as far as they were made."""
        used = [context.call for name in self.order or () if (context := self.contexts.get(name)) is not None]
        known = [call for call in used if call is not None]
        return len(known) == len(used) and not any(a.same_condition(b) for a, b in itertools.combinations(known, 2))

    def _ambiguous(self) -> str:
        return (
            f"The steps of this trajectory make different numbers of denoiser calls, and contexts names "
            f"{len(self.order or ())}: {', '.join(self.order or ())}. The calls do not differ in their arguments, so "
            "nothing says which of them a shorter step leaves out. Name each call where it is made: with "
            "run.context(name) in a loop of your own (modiff.trajectory gives run), with cache_context(name) in a "
            "pipeline."
        )

    def _refuse_shared_state(self, call: Call | None) -> None:
        if not self.stateful or self.last_call is None or call is None:
            return
        marked = self.one_call_per_step and self.calls_in_step > 0
        if not marked and call.same_condition(self.last_call, reads=False):
            return
        same_time = self._same_time(call)
        if marked and same_time is not False:
            raise TrajectoryError(
                "The denoiser was called twice in one step, and both calls would share one state. Name the calls "
                "of a step in their order, such as quantize_pipeline(pipe, config, contexts=('uncond', 'cond')); "
                "contexts=('all',) lets them share one."
            )
        if same_time and not call.same_condition(self.last_call):
            raise TrajectoryError(
                "The denoiser was called twice at one time step with different conditions, as guidance in two calls "
                "does, and both calls would share one state. Name the calls of a step in their order, such as "
                "modiff.trajectory(student, contexts=('uncond', 'cond')), or in quantize_pipeline(pipe, config, "
                "contexts=...); contexts=('all',) lets them share one."
            )

    def _grow(self, call: Call | None) -> None:
        """Warm up again where the batch doubles, because guidance in one batch begins on the way."""
        last = self.current.call
        if call is None or last is None or call.rows is None or last.rows is None or not self.guidance_may_end:
            return
        if call.rows == 2 * last.rows:
            self.current.begin_again()

    def end_step(self) -> None:
        """Mark the end of a step, with the sampler's own.

        Raises:
            TrajectoryError: The step left out calls that ``order`` names, and nothing says which.
        """
        partial = self.order is not None and self.calls_in_step % len(self.order) > 0
        used = sum(name in self.contexts for name in self.order or ())
        more = self.calls_in_step > len(self.order or ())
        if partial and self.stateful and (more or (used > 1 and not self._distinct())):
            raise TrajectoryError(self._ambiguous())
        self.calls_in_step, self.taken = 0, []

    def close(self) -> None:
        """Free the state; the counts stay."""
        for context in self.contexts.values():
            context.caches, context.outputs, context.branches, context.call = {}, {}, {}, None
        self.last_call = None
        self.closed = True
        self.in_evaluation = False

    def _get(self, name: str) -> Context:
        return self.contexts.setdefault(name, Context(name))


def context_names(contexts: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of contexts, checked.

    Raises:
        ConfigError: They are not names, each used once.
    """
    if contexts is None:
        return None
    names = tuple(contexts) if isinstance(contexts, Iterable) and not isinstance(contexts, str) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ConfigError(
            f"contexts is {contexts!r}; give the names of a step's denoiser calls in their order, each once, such as "
            "('uncond', 'cond')."
        )
    return names
