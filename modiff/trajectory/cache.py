"""What one call site of an operator keeps between evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        self.shape = torch.Size([rows, *self.shape[1:]])
        self.source = self.lent = None


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
