"""How the tensors of a module's call make up its arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
        return cls(_take(args, tensors), _take(kwargs, tensors)), tensors

    def build(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put tensors into the arguments; the inverse of :meth:`of`."""
        return _put(self.args, tensors), _put(self.kwargs, tensors)


def _take(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        leaf = _Leaf(f"input.{len(tensors)}")
        tensors[leaf.key] = value
        return leaf
    if isinstance(value, Mapping):
        return {key: _take(member, tensors) for key, member in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_take(member, tensors) for member in value)
    return value


def _put(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, _Leaf):
        return tensors[value.key]
    if isinstance(value, dict):
        return {key: _put(member, tensors) for key, member in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_put(member, tensors) for member in value)
    return value
