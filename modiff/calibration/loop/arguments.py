"""How the tensors of a module's call make up its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor in the arguments of a call."""

    key: str


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a module's call with the tensors taken out.

    Args:
        args: Positional arguments, with a leaf for each tensor.
        kwargs: Keyword arguments, with a leaf for each tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CallArguments, dict[str, Tensor]]:
        """Take the tensors out of the arguments of a call; return both.

        >>> import torch
        >>> arguments, tensors = CallArguments.of((torch.zeros(2, 3), None), {"skips": (torch.zeros(2, 1),)})
        >>> {key: tuple(t.shape) for key, t in tensors.items()}
        {'input.0': (2, 3), 'input.1': (2, 1)}
        >>> arguments.build(tensors)[0][1] is None
        True
        """
        tensors: dict[str, Tensor] = {}

        def take(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            leaf = _Leaf(f"input.{len(tensors)}")
            tensors[leaf.key] = value
            return leaf

        return cls(*tree_map(take, (args, kwargs))), tensors

    def build(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put tensors into the arguments; the inverse of :meth:`of`."""

        def put(value: Any) -> Any:
            return tensors[value.key] if isinstance(value, _Leaf) else value

        args, kwargs = tree_map(put, (self.args, self.kwargs))
        return args, kwargs
