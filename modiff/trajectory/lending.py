"""ô as an operator's output without a copy, and the guard that makes this safe: PyTorch's count of writes."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True)
class Lent:
    """A tensor that was given to whoever called the operator, known without keeping its memory.

    Args:
        counter: An empty tensor that shares the other one's count of writes.
        version: That count when the tensor was given.
        is_state: The tensor is ô itself, not a copy.
    """

    counter: Tensor
    version: int
    is_state: bool

    @classmethod
    def of(cls, tensor: Tensor, is_state: bool) -> Lent | None:
        """None where PyTorch counts no writes (inference tensors, tensor subclasses).

        >>> tensor = torch.zeros(3)
        >>> lent = Lent.of(tensor, is_state=False)
        >>> _ = tensor.view(3, 1).add_(1)
        >>> lent.written, lent.counter.untyped_storage().nbytes()
        (True, 0)
        """
        if type(tensor) is not Tensor or tensor.is_inference():
            return None
        with torch.inference_mode(False):
            counter = tensor.detach()
            counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return cls(counter, counter._version, is_state)

    @property
    def written(self) -> bool:
        """Whether somebody wrote to the tensor since."""
        return self.counter._version != self.version


def without_lent(output: Any, lent: Set[int]) -> Any:
    """The output of a denoiser with copies of what is the state of an operator; None: there is nothing to copy.

    Args:
        output: Nested tensors.
        lent: Addresses of the storages of all states that were given away.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.untyped_storage()._cdata in lent else tensor

    return tree_map_only(Tensor, own, output) if lent else None
