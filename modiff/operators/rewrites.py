"""Operators rewritten as small modules of ordinary ones: halves of a skip connection, migrated scales.

In full precision a rewritten operator computes what the original does, to float rounding. Its parts are ordinary
operators, each quantized with scales, activation range and state of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.quant import QuantConfig
from modiff.errors import ConfigError
from modiff.operators.adapters import find_adapter


class RewrittenOperator(nn.Module):
    """What stands in an operator's place; keeps the original for :func:`undo`, out of the walk.

    Args:
        original: A Linear or Conv.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._kept = (original,)  # in a tuple: not a submodule
        self.shapes = {key: p.shape for key, p in original._parameters.items() if p is not None}
        self.training = original.training

    @property
    def original(self) -> Any:
        """The operator in whose place this stands."""
        return self._kept[0]

    def release(self) -> None:
        """Free the original's weight; restoring then needs the teacher."""
        weight = self.original.weight
        self.original.weight = nn.Parameter(weight.new_empty(0), requires_grad=weight.requires_grad)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original (``in_channels``, ``weight``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_kept":
                raise
            return getattr(self._kept[0], name)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.original._apply(fn, recurse)
        return self


class SplitOperator(RewrittenOperator):
    """The two halves of an operator whose input is a concatenation along channels (Q-Diffusion, section 3.2).

    ``A([x, y]) + bias = (A_1(x) + bias) + A_2(y)``: features of the decoder and of a skip connection differ in range.

    Args:
        original: A Linear, or a Conv of one group.
        at: Channels of the first half.
    """

    def __init__(self, original: Any, at: int) -> None:
        super().__init__(original)
        self.at = at
        self.dim = -1 if isinstance(original, nn.Linear) else -len(original.kernel_size) - 1
        # Views of the one weight: no memory, and what is loaded into the original is seen here.
        self.first = _part(original, original.weight[:, :at], original.bias)
        self.second = _part(original, original.weight[:, at:], None)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both halves."""
        rest = x.shape[self.dim] - self.at
        output: Tensor = self.first(x.narrow(self.dim, 0, self.at)) + self.second(x.narrow(self.dim, self.at, rest))
        return output


class SmoothedOperator(RewrittenOperator):
    """A Linear whose input channels are divided by what its weight is multiplied with (SmoothQuant, equation 3).

    Args:
        original: A Linear.
        divisor: Positive, ``[in]``, in the dtype of the weight; None: ones, to be loaded.
    """

    divisor: Tensor

    def __init__(self, original: Any, divisor: Tensor | None) -> None:
        super().__init__(original)
        weight = original.weight
        if divisor is None:
            self.register_buffer("divisor", torch.ones_like(weight[0]))
            self.inner = _part(original, weight, original.bias)
        else:
            self.register_buffer("divisor", divisor.to(weight))
            self.inner = _part(original, weight * self.divisor, original.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``W' (x / divisor) + bias`` with ``W' = W * divisor``."""
        output: Tensor = self.inner(x / self.divisor.to(x.dtype))
        return output


def rewrite(
    model: nn.Module, config: QuantConfig, divisors: Mapping[str, Tensor] | None = None, loading: bool = False
) -> bool:
    """Rewrite the operators that a configuration names, in place; those that are already are left.

    Args:
        model: The denoiser, not a student.
        config: Its ``splits`` and ``smoothed``.
        divisors: Of each smoothed operator.
        loading: Divisors are about to be loaded.

    Returns:
        Whether anything changed.

    Raises:
        ConfigError: A name is no operator that can be rewritten so. The model is then unchanged.
    """
    made: list[tuple[str, nn.Module]] = []
    for split in config.splits:
        module = _find(model, split.name)
        if isinstance(module, SplitOperator) and module.at == split.at:
            continue
        channels = _channels(module)
        if channels is None or not 0 < split.at < channels or getattr(module, "groups", 1) != 1:
            raise ConfigError(
                f"splits names {split.name!r} at channel {split.at}, but that is {_what(module)}. Name a Linear, or a "
                "Conv of one group, and a channel inside its input."
            )
        made.append((split.name, SplitOperator(module, split.at)))
    for name in config.smoothed:
        module = _find(model, name)
        if isinstance(module, SmoothedOperator):
            continue
        if divisors is None and not loading:
            raise ConfigError(
                f"smoothed names {name!r}, whose divisors are not known. Calibrate with smoothing=0.5, or load a "
                "student that was."
            )
        if not isinstance(module, nn.Linear) or find_adapter(module) is None:
            raise ConfigError(f"smoothed names {name!r}, but that is {_what(module)}. Name a Linear.")
        made.append((name, SmoothedOperator(module, None if divisors is None else divisors[name])))
    for name, module in made:
        _replace(model, _find(model, name), module)
    return bool(made)


def undo(model: nn.Module) -> None:
    """Put the originals of all rewritten operators back."""
    for _, module in list(rewritten(model)):
        _replace(model, module, module.original)


def rewritten(model: nn.Module) -> Iterator[tuple[str, RewrittenOperator]]:
    """Rewritten operators by name."""
    for name, module in model.named_modules():
        if isinstance(module, RewrittenOperator):
            yield name, module


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _channels(module: nn.Module | None) -> int | None:
    if module is None or find_adapter(module) is None:
        return None
    weight: Any = module.weight
    return int(weight.shape[1])


def _what(module: nn.Module | None) -> str:
    if module is None:
        return "no module of this model"
    channels = _channels(module)
    return type(module).__name__ + ("" if channels is None else f" of {channels} input channels to a group")


def _replace(model: nn.Module, old: nn.Module | None, new: nn.Module) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def _part(original: Any, weight: Tensor, bias: nn.Parameter | None) -> Any:
    """A module like the original with another weight."""
    part = copy.copy(original)
    for key, value in vars(original).items():  # hooks of one part must not run in another
        if isinstance(value, dict):
            vars(part)[key] = value.copy()
    kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), original.weight.requires_grad)
    part._parameters = {"weight": kept, "bias": bias}
    size = "in_features" if isinstance(original, nn.Linear) else "in_channels"
    setattr(part, size, weight.shape[1] * getattr(original, "groups", 1))
    return part
