"""What is kept between evaluations: one cache per operator and call site, grouped in contexts of a trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from modiff.errors import ConfigError, TrajectoryError
from modiff.kernels.stages import Int16Grid

OUTPUT = "(output)"  # stands for the student's own output among the names of operators
DEFAULT = ""  # the context of calls that name none


@dataclass(frozen=True)
class InputIdentity:
    """Which values an input holds, known without reading them: its place in memory and PyTorch's count of writes.

    The weak reference keeps the memory's identity, not the memory: it cannot be mistaken for one that was freed.
    """

    storage: StorageWeakRef
    place: tuple[object, ...]

    @classmethod
    def of(cls, x: Tensor) -> InputIdentity | None:
        """The identity of a tensor; None where PyTorch counts no writes (inference tensors, tensor subclasses)."""
        place = _place(x)
        return None if place is None else cls(StorageWeakRef(x.untyped_storage()), place)

    def matches(self, x: Tensor) -> bool:
        """Whether ``x`` is that tensor, or an equal view of it, unchanged since."""
        return bool(_place(x) == self.place and x.untyped_storage()._cdata == self.storage.cdata)


def _place(x: Tensor) -> tuple[object, ...] | None:
    if type(x) not in (Tensor, nn.Parameter) or x.is_inference():
        return None
    return x.data_ptr(), x._version, x.dtype, x.shape, x.stride()


@dataclass(frozen=True)
class KeptOutput:
    """What a module returned for an input, to be returned again while both are as they were."""

    source: InputIdentity
    output: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor, output: Tensor) -> KeptOutput | None:
        """None where PyTorch counts no writes."""
        source = InputIdentity.of(x)
        return None if source is None or output.is_inference() else cls(source, output, output._version)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` is that input, unchanged, and nobody wrote to the output."""
        return self.output._version == self.version and self.source.matches(x)


@dataclass
class OperatorCache:
    """What one call site of a modulated operator keeps between evaluations.

    Args:
        a_hat: Reconstruction â of the input (without error compensation: the last input itself); shape of the input;
            float, or int16 numbers of ``grid``.
        o_hat: Output ô = A(â) + bias; shape of the output, dtype ``state_dtype``.
        source: The input that ``a_hat`` equals exactly; None where it is only near.
        grid: What the numbers of an integer ``a_hat`` are worth; None where it is a float.
        leader: The cache of another operator that reads the same tensor under the same quantizer, and keeps â for both.
        codes: Of a leader, in the current evaluation, for those that follow: its input, codes and their scale.
        followers: How many follow.
        traced: Like ``codes``, inside a compiled region.
    """

    a_hat: Tensor
    o_hat: Tensor
    source: InputIdentity | None = None
    grid: Int16Grid | None = None
    leader: OperatorCache | None = None
    codes: tuple[InputIdentity | None, Tensor, Tensor] | None = None
    followers: int = 0
    traced: tuple[Tensor, Tensor] | None = None

    def reconstruction(self) -> Tensor:
        """â as a float."""
        return self.a_hat if self.grid is None else self.grid.decode(self.a_hat)

    def hold(self, a: Tensor) -> None:
        """``â = a`` (equation 8), to the nearest step where â is an integer."""
        if self.grid is None:
            self.a_hat.copy_(a)
        else:
            self.grid.fit(a)
            self.a_hat.copy_(self.grid.encode(a))

    def clear(self, a: Tensor) -> None:
        """``â = 0``, which every grid holds, ready to approach ``a``."""
        if self.grid is None:
            self.a_hat.zero_()
        else:
            self.grid.fit(a)
            self.a_hat.copy_(-self.grid.center)

    @property
    def num_bytes(self) -> int:
        """Bytes of â and ô; â counts where it is kept."""
        kept = (self.o_hat,) if self.leader is not None else (self.a_hat, self.o_hat)
        return sum(t.numel() * t.element_size() for t in kept)

    def keep_last_half(self) -> None:
        """Keep the last half of the rows: ``ô = A(â) + bias`` holds row by row."""
        rows = self.a_hat.shape[0] // 2
        self.o_hat = self.o_hat[self.o_hat.shape[0] // 2 :].clone()
        self.a_hat = self.a_hat[rows:].clone() if self.leader is None else self.leader.a_hat
        self.source = None


@dataclass
class Region:
    """What an operator inside a compiled region may read: set outside of it, before each evaluation.

    Args:
        caches: Of its calls, in their order; empty for plain quantization.
        constant: Which of the calls have a fixed input.
        fixed: Calibrated scale and zero point of this evaluation.
        offset: The unsigned code that stands for 0; None: floating point.
        shape: Of an input that ran eagerly; None before the first.
        call: Calls so far in this evaluation.
    """

    caches: list[OperatorCache] = field(default_factory=list)
    constant: tuple[bool, ...] = ()
    fixed: tuple[Tensor, Tensor | None] | None = None
    offset: int | None = None
    shape: torch.Size | None = None
    call: int = 0


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
        outputs: What modules between a fixed input and operators returned for it, by module.
    """

    name: str
    total: int = 0
    quantized: int = 0
    caches: dict[str, list[OperatorCache]] = field(default_factory=dict, repr=False)
    calls: dict[str, int] | None = field(default=None, repr=False)
    unchanged: dict[str, int] = field(default_factory=dict, repr=False)
    shapes: tuple[object, ...] = field(default=(), repr=False)
    outputs: dict[str, KeptOutput | None] = field(default_factory=dict, repr=False)

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
    probes: list[tuple[list[str], Tensor]] = field(default_factory=list, repr=False)
    changes: list[tuple[list[str], Tensor]] = field(default_factory=list, repr=False)

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
        """Operators that were computed in the first evaluation of each context only, because their input was fixed."""
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
            context.caches, context.outputs = {}, {}
        self.closed = True
        self.in_evaluation = False

    def _get(self, name: str) -> Context:
        return self.contexts.setdefault(name, Context(name))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from tensors_of(member)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from tensors_of(member)


def first_flag(flags: list[tuple[list[str], Tensor]]) -> tuple[str, int] | None:
    """First name whose flag is set, and its index in the list.

    Synchronizes with the device, once unless something is found.

    Args:
        flags: Names and a flag for each, by evaluation.
    """
    if not flags:
        return None
    bad = torch.stack([flag.any() for _, flag in flags]).tolist()
    if not any(bad):
        return None
    index = bad.index(True)
    names, flag = flags[index]
    return names[int(flag.int().argmax())], index


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized dense memory in the shape and layout of ``x``, usable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty_like(x, dtype=dtype)
