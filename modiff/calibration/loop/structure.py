"""How the tensors of a module's call make up its arguments; and which modules are blocks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modiff.operators.rewrites import rewritten
from modiff.student.blocks import find_blocks
from modiff.student.tensors import slots

__all__ = ["Structure", "find_blocks", "shared_copy"]


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor in the arguments of a call."""

    key: str


@dataclass(frozen=True)
class Structure:
    """The arguments of a module's call with the tensors taken out.

    Args:
        args: Positional arguments, a leaf for each tensor.
        kwargs: Keyword arguments, likewise.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Structure, dict[str, Tensor]]:
        """The structure of a call, and its tensors by key.

        >>> import torch
        >>> structure, tensors = Structure.of((torch.zeros(2, 3), None), {"skips": (torch.zeros(2, 1),)})
        >>> {key: tuple(t.shape) for key, t in tensors.items()}
        {'input.0': (2, 3), 'input.1': (2, 1)}
        >>> structure.build(tensors)[0][1] is None
        True
        """
        tensors: dict[str, Tensor] = {}
        return cls(_take(args, tensors), _take(kwargs, tensors)), tensors

    def build(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors put in; the inverse of :meth:`of`."""
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


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own, and whose parameters and buffers are the model's."""
    kept: dict[int, Any] = {id(slot.tensor): slot.tensor for slot in slots(model)}
    kept |= {id(whole.original): whole.original for _, whole in rewritten(model)}
    return copy.deepcopy(model, kept)
