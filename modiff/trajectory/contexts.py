"""One trajectory from noise to image: the counts and state of each context of its denoiser calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from modiff.errors import ConfigError, TrajectoryError
from modiff.trajectory.cache import BranchCache, OperatorCache
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

    def begin(self) -> None:
        """Start an evaluation: choose its context."""
        if self.named is not None:
            self.current = self._get(self.named)
        elif self.order is not None:
            self.current = self._get(self.order[self.calls_in_step % len(self.order)])
            self.calls_in_step += 1
        else:
            if self.one_call_per_step and self.calls_in_step:
                raise TrajectoryError(
                    "The denoiser was called twice in one step, and both calls would share one state. Name the calls "
                    "of a step in their order, such as quantize_pipeline(pipe, config, contexts=('uncond', 'cond')); "
                    "contexts=('all',) lets them share one."
                )
            self.current = self._get(DEFAULT)
            self.calls_in_step += 1
        self.in_evaluation = True

    def end_step(self) -> None:
        """Mark the end of a step, with the sampler's own.

        Raises:
            TrajectoryError: The step made other calls than ``order`` names.
        """
        if self.order is not None and self.calls_in_step % len(self.order):
            raise TrajectoryError(
                f"A step made {self.calls_in_step} denoiser calls, but contexts names {len(self.order)}: "
                f"{', '.join(self.order)}. Where guidance switches off mid-way, use a pipeline that names its calls by "
                "cache_context, or a loop of your own with run.context(name); else name the calls that a step makes."
            )
        self.calls_in_step = 0

    def close(self) -> None:
        """Free the state; the counts stay."""
        for context in self.contexts.values():
            context.caches, context.outputs, context.branches = {}, {}, {}
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
    names = () if isinstance(contexts, str) else tuple(contexts)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            f"contexts is {contexts!r}; give the names of a step's denoiser calls in their order, each once, such as "
            "('uncond', 'cond')."
        )
    return names
