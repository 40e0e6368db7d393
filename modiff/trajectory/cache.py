"""What one call site of an operator keeps between evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modiff.errors import TrajectoryError
from modiff.quantizers.held import Held, Int16Grid
from modiff.trajectory.identity import InputIdentity
from modiff.trajectory.lending import Lent


@dataclass
class OperatorCache:
    """What one call site of a modulated operator keeps between evaluations.

    Operators that read the same tensor under the same quantizer share â: the first one leads, the others follow.

    Args:
        held: Reconstruction â of the input (without error compensation: the last input itself); a follower has its
            leader's.
        o_hat: Output ô = A(â) + bias; shape of the output, dtype ``state_dtype``.
        shape: Of the input.
        source: The input that â equals exactly; None where it is only near.
        leader: The cache of the operator that advances â for this one too.
        followers: How many follow.
        encoded: Of a leader, what it encoded in the current evaluation, for those that follow.
        encoded_from: The input that ``encoded`` was made from.
        lent: What was returned in the last evaluation; None where PyTorch counts no writes to it.
        copies: Whoever reads the output writes to it, so that ô itself is never returned.
    """

    held: Held
    o_hat: Tensor
    shape: torch.Size
    source: InputIdentity | None = None
    leader: OperatorCache | None = None
    followers: int = 0
    encoded: Any = None
    encoded_from: InputIdentity | None = None
    lent: Lent | None = None
    copies: bool = False

    @property
    def a_hat(self) -> Tensor:
        """â as it is kept: floats, or int16 numbers of ``grid``."""
        return self.held.a_hat

    @property
    def grid(self) -> Int16Grid | None:
        """What the numbers of an integer â are worth."""
        return self.held.grid

    def reconstruction(self) -> Tensor:
        """â as floats."""
        return self.held.value()

    @property
    def num_bytes(self) -> int:
        """Bytes of â and ô; â counts where it is kept."""
        kept = (self.o_hat,) if self.leader is not None else (self.held.a_hat, self.o_hat)
        return sum(t.numel() * t.element_size() for t in kept)

    def keep_last_half(self) -> None:
        """Keep the last half of the rows: ``ô = A(â) + bias`` holds row by row."""
        rows = self.shape[0] // 2
        self.o_hat = self.o_hat[self.o_hat.shape[0] // 2 :].clone()
        if self.leader is None:
            self.held.a_hat = self.held.a_hat[rows:].clone()
            last = self.held.last
            if last is not None and last.shape[1] == self.shape[0]:  # one range for each sample
                self.held.last = last[:, rows:].clone()
        self.shape = torch.Size([rows, *self.shape[1:]])
        self.source = self.lent = None


@dataclass
class BranchCache:
    """What one call site of a block keeps of the evaluations that computed it.

    Args:
        shape: Of the block's first input.
        kept: The last branches (what the outputs add to their sources), newest last, with their time step and number
            of the evaluation.
        sources: Where each output's base is found: an index among the input tensors, ``shortcut``, or None where the
            output itself is kept.
        structure: How the outputs are nested.
        calls: Calls of each operator inside.
        input: The block's first input when it was last computed, for dynamic schedules.
    """

    shape: torch.Size | None = None
    kept: list[tuple[tuple[Any, ...], Tensor | None, int]] = field(default_factory=list)
    sources: tuple[Any, ...] = ()
    structure: Any = None
    calls: dict[str, int] = field(default_factory=dict)
    input: Tensor | None = None

    def fit(self, x: Tensor, may_halve: bool, name: str) -> None:
        """Check the batch; where guidance in one batch has ended, keep the last half of the rows.

        Raises:
            TrajectoryError: The shape changed otherwise.
        """
        if self.shape is None or self.shape == x.shape:
            self.shape = x.shape
            return
        if not may_halve or torch.Size([2 * x.shape[0], *x.shape[1:]]) != self.shape:
            raise TrajectoryError(
                f"The input of block {name!r} has shape {list(x.shape)}, but had {list(self.shape)} when its branch "
                "was kept. Keep the batch through a trajectory; open a new one for another batch."
            )
        rows = x.shape[0]
        halves = lambda t: t[rows:].clone() if isinstance(t, Tensor) and len(t) == 2 * rows else t  # noqa: E731
        self.kept = [(tuple(map(halves, branches)), time, number) for branches, time, number in self.kept]
        self.input = None if self.input is None else halves(self.input)
        self.shape = x.shape

    def keep(self, branches: tuple[Any, ...], time: Tensor | None, evaluation: int, both: bool) -> None:
        """Keep the branches of a computed evaluation, and of the one before where the schedule extrapolates."""
        self.kept = [*(self.kept[-1:] if both else []), (branches, time, evaluation)]

    def branches(self, mode: str, time: Tensor | None, evaluation: int) -> tuple[Any, ...]:
        """The branches that stand in for those of a skipped evaluation.

        Args:
            mode: ``reuse``: the last ones; ``extrapolate``: on the line through the last two in the time step.
            time: Of the evaluation; None: its number takes the time's place.
            evaluation: Its number.
        """
        last, last_time, last_number = self.kept[-1]
        if mode == "reuse" or len(self.kept) < 2:
            return last
        first, first_time, first_number = self.kept[0]
        if time is None or last_time is None or first_time is None:
            step: Any = (evaluation - last_number) / (last_number - first_number)
        else:  # solvers of higher order evaluate a time step twice: the line then has no slope
            gap = last_time - first_time
            step = torch.where(gap == 0, 0.0, (time - last_time) / torch.where(gap == 0, 1.0, gap))
        return tuple(_on_line(old, new, step) for old, new in zip(first, last, strict=True))

    @property
    def num_bytes(self) -> int:
        """Bytes of the branches."""
        tensors = [t for branches, _, _ in self.kept for t in branches if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def _on_line(old: Any, new: Any, step: Any) -> Any:
    if not isinstance(new, Tensor):
        return new
    wide = torch.promote_types(new.dtype, torch.float32)
    step = step.to(device=new.device, dtype=wide) if isinstance(step, Tensor) else step
    return (new.to(wide) + (new.to(wide) - old.to(wide)) * step).to(new.dtype)


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized dense memory in the shape and layout of ``x``, usable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty_like(x, dtype=dtype)


def static_room(
    static: Mapping[str, list[OperatorCache]], caches: Mapping[str, list[OperatorCache]], name: str, a: Tensor
) -> OperatorCache | None:
    """In the first evaluation: a cache of an earlier trajectory whose memory fits; None: make a new one.

    Args:
        static: Caches whose memory CUDA graphs hold, by operator.
        caches: Those of this trajectory so far.
        name: The operator.
        a: Its input.
    """
    kept, call = static.get(name, []), len(caches.get(name, []))
    found = kept[call] if call < len(kept) else None
    fits = found is not None and found.shape == a.shape and found.a_hat.device == a.device
    return found if fits else None
