"""What is common to the linear operators: one adapter for each type."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError
from modiff.kernels.backend import OperatorShape
from modiff.kernels.float import linear_map


class OperatorAdapter(ABC):
    """How an operator type applies a weight.

    An adapter serves ``types`` and those subclasses that inherit their ``forward`` unchanged.
    """

    kind: str
    types: tuple[type[nn.Module], ...]

    @abstractmethod
    def shape(self, module: Any, weight: QuantSpec | None = None) -> OperatorShape:
        """What the operator is, as plain data.

        Args:
            module: The original.
            weight: How its weight is quantized.
        """

    @abstractmethod
    def macs(self, module: Any, output: Tensor) -> int:
        """Multiply-accumulates of one call that returned ``output``."""

    def apply(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``A(x) + bias`` with ``weight`` in place of the module's own."""
        return linear_map(x, weight, bias, self.shape(module))

    def is_batched(self, module: Any, ndim: int) -> bool:
        """Whether dim 0 of an input with ``ndim`` dims counts samples; PyTorch takes single samples too."""
        return ndim > len(getattr(module, "kernel_size", ())) + 1


class LinearAdapter(OperatorAdapter):
    """``nn.Linear``: inputs ``[..., in]``."""

    kind = "linear"
    types = (nn.Linear,)

    @override
    def shape(self, module: Any, weight: QuantSpec | None = None) -> OperatorShape:
        return OperatorShape("linear", module.in_features, module.out_features, weight)

    @override
    def macs(self, module: Any, output: Tensor) -> int:
        return output.numel() * int(module.in_features)


class ConvAdapter(OperatorAdapter):
    """``nn.Conv1d``, ``Conv2d`` and ``Conv3d``: inputs ``[B, C, *spatial]``, any stride, padding, dilation, groups."""

    kind = "conv"
    types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @override
    def shape(self, module: Any, weight: QuantSpec | None = None) -> OperatorShape:
        # PyTorch keeps numbers here, whether the padding was given as numbers or as 'same'; the last dim comes first.
        pads = module._reversed_padding_repeated_twice
        return OperatorShape(
            "conv",
            module.in_channels,
            module.out_channels,
            weight,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=tuple((pads[i], pads[i + 1]) for i in range(0, len(pads), 2))[::-1],
            dilation=tuple(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
        )

    @override
    def macs(self, module: Any, output: Tensor) -> int:
        return output.numel() * int(module.in_channels // module.groups) * math.prod(module.kernel_size)


ADAPTERS: tuple[OperatorAdapter, ...] = (LinearAdapter(), ConvAdapter())


def find_adapter(module: nn.Module) -> OperatorAdapter | None:
    """The adapter that serves a module, or None for modules that are not linear operators.

    Raises:
        ConfigError: The module is a linear operator whose ``forward`` was overridden, by its class or on the instance.
    """
    for adapter in ADAPTERS:
        for base in adapter.types:
            if isinstance(module, base):
                if type(module).forward is not base.forward or "forward" in vars(module):
                    raise ConfigError(f"{type(module).__name__} overrides the forward of {base.__name__}")
                return adapter
    return None


def bypassed_operators(model: nn.Module) -> dict[str, str]:
    """Operators of which PyTorch's own modules use the weight without calling them, and why they are skipped."""
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{prefix}out_proj"] = "nn.MultiheadAttention uses its weight directly"
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                found[prefix + child] = "nn.TransformerEncoderLayer's fast path uses its weight directly"
    return found


def is_unsupported(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight in a way that no adapter serves."""
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.MultiheadAttention)
    return isinstance(module, kinds)
