"""What tells one call of a denoiser from another: its time step, and what it is conditioned on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from modiff.errors import ConfigError

TIME = ("timestep", "timesteps", "time_step", "t", "time", "sigma", "sigmas", "noise_level", "noise_labels")
"""Names of the parameter of a denoiser's forward that is the time step."""


@dataclass(frozen=True)
class Seen:
    """A value as it was in a call.

    Args:
        value: A tensor, kept so that its memory is not used for another one, or anything else.
        writes: How often PyTorch had counted a write to it.
    """

    value: Any
    writes: int | None

    @classmethod
    def of(cls, value: Any) -> Seen:
        """A value as it is now."""
        counted = isinstance(value, Tensor) and not value.is_inference()
        return cls(value, value._version if counted else None)

    def is_very(self, other: Seen) -> bool:
        """Whether both are the same without a look at values."""
        if isinstance(self.value, Tensor):
            same = isinstance(other.value, Tensor) and self.value.data_ptr() == other.value.data_ptr()
            return same and self.value.shape == other.value.shape and self.writes == other.writes
        return bool(self.equals(other))

    def equals(self, other: Seen, reads: bool = True) -> bool | None:
        """Whether both were the same.

        Args:
            other: Of another call.
            reads: Values may be read from a device, which waits for it; else the answer is None where only they tell.
        """
        a, b = self.value, other.value
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            same_kind = isinstance(a, Tensor) == isinstance(b, Tensor)
            return same_kind and type(a) is type(b) and (a is b or _equal(a, b))
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return self.writes == other.writes  # one of them was overwritten
        if not reads and a.device.type != "cpu":
            return None
        return torch.equal(a, b)


@dataclass(frozen=True)
class Call:
    """One call of a denoiser.

    Args:
        rows: Of the batch; None where no argument is a tensor with a batch.
        time: The time step; None where no argument is known to be one.
        condition: All other arguments but the first tensor, which is x_t.
    """

    rows: int | None
    time: Seen | None
    condition: tuple[tuple[str, Seen], ...]

    @classmethod
    def of(cls, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call by its arguments.

        Args:
            names: Of the forward's parameters.
            args: Given by position.
            kwargs: Given by name.
        """
        places = [names[i] if i < len(names) else str(i) for i in range(len(args))]
        given = {**dict(zip(places, args, strict=True)), **kwargs}
        first = next((k for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 0), None)
        rows = None if first is None else int(given.pop(first).shape[0])
        when = next((name for name in given if name in TIME), None)
        if when is None and len(args) > 1 and places[1] in given and _is_time(args[1]):
            when = places[1]
        time = None if when is None else Seen.of(given.pop(when))
        condition = [(f"{k}.{i}", Seen.of(v)) for k, value in given.items() for i, v in enumerate(tree_leaves(value))]
        return cls(rows, time, tuple(sorted(condition, key=lambda item: item[0])))

    def same_time(self, other: Call, reads: bool = True) -> bool | None:
        """Whether both are of one time step; None where it is not known."""
        return None if self.time is None or other.time is None else self.time.equals(other.time, reads)

    def same_condition(self, other: Call, reads: bool = True) -> bool:
        """Whether both have the same arguments but for x_t and the time step.

        Args:
            other: The other call.
            reads: Values may be read; else only the very same tensors count as the same.
        """
        if [name for name, _ in self.condition] != [name for name, _ in other.condition]:
            return False
        pairs = zip(self.condition, other.condition, strict=True)
        return all(a.equals(b) if reads else a.is_very(b) for (_, a), (_, b) in pairs)


def _is_time(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim <= 1
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # objects of others may compare to anything, or to nothing
        return False


@functools.cache
def parameters_of(cls: Any) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments or outputs of a call."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):  # of a class that PyTorch does not know
            yield from tensors_of(dict(leaf))


def require_module(model: object) -> None:
    """Refuse a pipeline where its denoiser is meant.

    Raises:
        ConfigError: It is one, or no module at all.
    """
    if isinstance(model, nn.Module):
        return
    parts = getattr(model, "components", None)
    modules = [k for k, v in parts.items() if isinstance(v, nn.Module)] if isinstance(parts, dict) else []
    names = [name for name in modules if name.startswith(("unet", "transformer"))] or modules
    if names:
        raise ConfigError(f"A {type(model).__name__} is a pipeline. Give its denoiser: pipe.{names[0]}.")
    raise ConfigError(f"A {type(model).__name__} is no module. Give a denoiser, such as pipe.unet or pipe.transformer.")
