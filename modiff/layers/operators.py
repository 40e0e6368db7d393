"""What is common to the linear operators: one adapter for each type."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F

from modiff.errors import ConfigError


class OperatorAdapter(ABC):
    """How an operator type applies a weight.

    An adapter serves ``types`` and those subclasses that inherit their ``forward`` unchanged.
    """

    kind: str
    types: tuple[type[nn.Module], ...]

    @abstractmethod
    def apply(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``A(x) + bias`` with ``weight`` in place of the module's own."""

    @abstractmethod
    def macs(self, module: nn.Module, output: Tensor) -> int:
        """Multiply-accumulates of one call that returned ``output``."""


class LinearAdapter(OperatorAdapter):
    """``nn.Linear``: inputs ``[..., in]``."""

    kind = "linear"
    types = (nn.Linear,)

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See the base class."""
        return F.linear(x, weight, bias)

    def macs(self, module: nn.Module, output: Tensor) -> int:
        """See the base class."""
        return output.numel() * module.in_features


class ConvAdapter(OperatorAdapter):
    """``nn.Conv1d``, ``Conv2d`` and ``Conv3d``: inputs ``[B, C, *spatial]``, any stride, padding, dilation, groups."""

    kind = "conv"
    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def apply(self, module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See the base class; PyTorch's own helper pads by ``padding_mode``."""
        return module._conv_forward(x, weight, bias)

    def macs(self, module: nn.Module, output: Tensor) -> int:
        """See the base class."""
        return output.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)


ADAPTERS: tuple[OperatorAdapter, ...] = (LinearAdapter(), ConvAdapter())


def find_adapter(module: nn.Module) -> OperatorAdapter | None:
    """The adapter that serves a module, or None for modules that are not linear operators.

    Raises:
        ConfigError: The module is a linear operator whose ``forward`` was overridden.
    """
    for adapter in ADAPTERS:
        for base in adapter.types:
            if isinstance(module, base):
                if type(module).forward is not base.forward:
                    raise ConfigError(f"{type(module).__name__} overrides the forward of {base.__name__}")
                return adapter
    return None
