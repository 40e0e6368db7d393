"""What a closed-loop run does: its evaluations, the order of calls, the modules that can run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modiff.calibration.loop.arguments import CallArguments
from modiff.operators.quantized import QuantizedOperator
from modiff.storage.hashing import hash_text


@dataclass
class Trace:
    """What one closed-loop run did.

    Args:
        lengths: Evaluations of each trajectory.
        steps: Evaluations of the longest trajectory, within one context.
        order: Operators in the order of their first call.
        calls: Calls of each operator in one evaluation.
        usable: Modules that can be run alone: called once in each evaluation, always in the same way, with tensors of
            the batch in and one tensor of the batch out.
        digests: Hashes of the inputs of the trajectories' first evaluations: the noise, and with it the run.
        mine: Places in ``lengths`` of the trajectories of this process.
    """

    lengths: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    usable: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    steps: int = 0
    mine: list[int] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Hash of the run; it does not depend on how trajectories are dealt to processes."""
        return hash_text("".join(self.digests))

    def choose(self, count: int | None) -> list[int]:
        """Choose the evaluations that are recorded: ``count`` of the longest trajectory, evenly from first to last.

        >>> Trace(lengths=[20]).choose(4)
        [0, 6, 13, 19]
        """
        return _evenly(count, max(self.lengths))

    def choose_steps(self, count: int | None) -> list[int]:
        """Choose evaluations in the same way, where they are counted within a context."""
        return _evenly(count, self.steps)

    def recorded(self, chosen: Sequence[int]) -> int:
        """Count the evaluations of the whole run that are among ``chosen``."""
        return sum(i < length for length in self.lengths for i in chosen)

    def ordinal(self, chosen: Sequence[int], trajectory: int, index: int) -> int:
        """Count the recorded evaluations before evaluation ``index`` of a trajectory.

        >>> Trace(lengths=[20, 4]).ordinal([0, 6, 13], 1, 0)
        3
        """
        before = sum(i < length for length in self.lengths[:trajectory] for i in chosen)
        return before + sum(i < index for i in chosen)

    def share(self, chosen: Sequence[int], place: int, most: int) -> int:
        """Return a recorded evaluation's share of ``most`` samples, by its :meth:`ordinal`; shares differ by 1 at most.

        >>> [Trace(lengths=[4]).share([0, 1, 2], place, 8) for place in range(3)]
        [2, 3, 3]
        """
        total = self.recorded(chosen)
        return most * (place + 1) // total - most * place // total


def merged(traces: Sequence[Trace], rank: int = 0) -> Trace:
    """Merge the traces of the processes that share a run into one.

    Trajectories are counted in turn: the first of each process, then the second of each.

    Args:
        traces: By rank.
        rank: Of the process whose ``mine`` it gets.

    >>> merged([Trace([5, 7], digests=["a", "c"]), Trace([6], digests=["b"])], rank=1)
    Trace(lengths=[5, 6, 7], order=[], calls={}, usable=[], digests=['a', 'b', 'c'], steps=0, mine=[1])
    """
    order = sorted((i, r) for r, trace in enumerate(traces) for i in range(len(trace.lengths)))
    ran = [trace for trace in traces if trace.lengths] or [Trace()]
    return Trace(
        lengths=[traces[r].lengths[i] for i, r in order],
        order=ran[0].order,
        calls=ran[0].calls,
        usable=[name for name in ran[0].usable if all(name in trace.usable for trace in ran)],
        digests=[traces[r].digests[i] for i, r in order],
        steps=max(trace.steps for trace in ran),
        mine=[place for place, (_, r) in enumerate(order) if r == rank],
    )


def _evenly(count: int | None, length: int) -> list[int]:
    if count is None or count >= length:
        return list(range(length))
    return [length // 2] if count == 1 else [round(i * (length - 1) / (count - 1)) for i in range(count)]


class Evaluation:
    """Which evaluation is running; prints as ``evaluation 3 (from 0), time step 450``."""

    index = 0
    timestep: Any = None

    def start(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the evaluation that begins, and the time step among its arguments."""
        self.index = index
        self.timestep = args[1] if len(args) > 1 else kwargs.get("timestep")

    def __str__(self) -> str:
        t = self.timestep
        if isinstance(t, Tensor):
            t = t.flatten()[0].item() if t.ndim < 2 and t.numel() else None
        return f"evaluation {self.index} (from 0)" + (f", time step {t:g}" if isinstance(t, (int, float)) else "")


class ModuleCalls:
    """Watches every module of a student but its operators, to find those that can be run alone."""

    def __init__(self, student: nn.Module) -> None:
        self.arguments: dict[str, CallArguments] = {}
        self.refused: set[str] = set()
        self.seen: dict[str, set[int]] = {}
        self.hooks = []
        inside = tuple(f"{name}." for name, m in student.named_modules() if isinstance(m, QuantizedOperator))
        for name, module in student.named_modules():
            if name and not isinstance(module, QuantizedOperator) and not name.startswith(inside):
                self.hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            arguments, tensors = CallArguments.of(args, kwargs)
            again = name in self.seen or self.arguments.setdefault(name, arguments) != arguments
            if again or not tensors or not isinstance(output, Tensor) or any(t.ndim == 0 for t in tensors.values()):
                self.refused.add(name)
            else:
                self.seen[name] = {len(t) for t in (*tensors.values(), output)} if output.ndim else {-1}

        return hook

    def begin(self) -> None:
        """Begin an evaluation."""
        self.seen = {}

    def end(self, output: Any) -> None:
        """Compare batches at the end of an evaluation, where the batch is known."""
        first = output if isinstance(output, Tensor) else next(iter(CallArguments.of((output,), {})[1].values()), None)
        batch = None if first is None or first.ndim == 0 else len(first)
        self.refused |= {name for name, sizes in self.seen.items() if sizes != {batch}}
        self.refused |= set(self.arguments) - set(self.seen)

    def usable(self) -> list[str]:
        """Return the modules that can be run alone, as far as was seen; see :class:`Trace`."""
        return [name for name in self.arguments if name not in self.refused]


@contextmanager
def removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
