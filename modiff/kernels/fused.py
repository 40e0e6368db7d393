"""What a backend may take into an operator's passes: norms and activations before it, sums after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Before:
    """What stands between the tensor that is read and the operator's input, done in the same pass.

    Args:
        norm: ``group``, ``layer`` or None.
        activation: ``silu``, ``gelu_tanh``, ``gelu`` or None; after the norm. ``geglu``: the tensor has twice the
            operator's channels, and its first half times GELU of its second half is the input; without a norm.
        groups: Of a group norm.
        mul: Factor after the norm, float32 ``[C]``, or of a layer norm ``[B, C]``; None: 1.
        add: Summand after it, likewise; None: 0.
        shift: Added to the input of a group norm, float32 ``[B, C]``.
        eps: Of the norm.
    """

    norm: str | None = None
    activation: str | None = None
    groups: int = 1
    mul: Tensor | None = None
    add: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 0.0

    def input(self, x: Tensor) -> Tensor:
        """Something in the shape of the operator's input, where ``x`` is what is read."""
        return x[..., : x.shape[-1] // 2] if self.activation == "geglu" else x


@dataclass(frozen=True)
class After:
    """What follows the accumulation: ``(gate * o + residual) * factor``.

    Args:
        residual: In the shape of the output, float32 or half precision.
        gate: float32 ``[B, C]``.
        factor: See above.
        dtype: Of the result; None: there is none, ô is read in its place.
        lends: The result is only read, so that ô itself may be given where it has that dtype.
    """

    residual: Tensor | None = None
    gate: Tensor | None = None
    factor: float = 1.0
    dtype: torch.dtype | None = torch.float32
    lends: bool = False
