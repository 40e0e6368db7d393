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
from modiff.kernels.transposed import canonical, native


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

    def canonical(self, module: Any, weight: Tensor) -> Tensor:
        """A weight of the module's own shape as ``[out, in / groups, *kernel]``."""
        return weight

    def native(self, module: Any, weight: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return weight

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


class ConvTransposeAdapter(OperatorAdapter):
    """``nn.ConvTranspose1d``, ``ConvTranspose2d`` and ``ConvTranspose3d``, called without ``output_size``.

    Rules and granularities take them for convolutions.
    """

    kind = "conv"
    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @override
    def shape(self, module: Any, weight: QuantSpec | None = None) -> OperatorShape:
        return OperatorShape(
            "conv_transpose",
            module.in_channels,
            module.out_channels,
            weight,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=tuple((pad, pad) for pad in module.padding),
            dilation=tuple(module.dilation),
            output_padding=tuple(module.output_padding),
            groups=module.groups,
        )

    @override
    def macs(self, module: Any, output: Tensor) -> int:
        # Every input value meets the kernel once; from the output's size that is the input's up to its borders.
        rank = len(module.kernel_size)
        sizes = zip(
            output.shape[-rank:],
            module.stride,
            module.padding,
            module.dilation,
            module.kernel_size,
            module.output_padding,
            strict=True,
        )
        places = [(n - 1 - o + 2 * p - d * (k - 1)) // s + 1 for n, s, p, d, k, o in sizes]
        batch = math.prod(output.shape[: output.ndim - rank - 1])
        each = module.in_channels * module.out_channels // module.groups * math.prod(module.kernel_size)
        return batch * math.prod(places) * int(each)

    @override
    def canonical(self, module: Any, weight: Tensor) -> Tensor:
        return canonical(weight, module.groups)

    @override
    def native(self, module: Any, weight: Tensor) -> Tensor:
        return native(weight, module.groups)


ADAPTERS: list[OperatorAdapter] = [LinearAdapter(), ConvAdapter(), ConvTransposeAdapter()]


def register_adapter(adapter: OperatorAdapter) -> OperatorAdapter:
    """Have modules of ``adapter.types`` quantized: a linear operator of one's own.

    It is asked before those that are there. docs/models.md has an example.

    Raises:
        ConfigError: It is no adapter.
    """
    if not isinstance(adapter, OperatorAdapter):
        raise ConfigError(f"{adapter!r} is no adapter; give an object of a subclass of OperatorAdapter.")
    ADAPTERS.insert(0, adapter)
    return adapter


def find_adapter(module: nn.Module) -> OperatorAdapter | None:
    """The adapter that serves a module, or None for modules that are not linear operators.

    Raises:
        ConfigError: The module is a linear operator whose ``forward`` was overridden, by its class or on the instance.
    """
    for adapter in ADAPTERS:
        for base in adapter.types:
            if isinstance(module, base):
                for method in ("forward", "_conv_forward"):
                    theirs, own = getattr(base, method, None), getattr(type(module), method, None)
                    if own is not theirs or method in vars(module):
                        raise ConfigError(f"{type(module).__name__} overrides the {method} of {base.__name__}")
                return adapter
    return None


def adapter_of_type(module: nn.Module) -> OperatorAdapter | None:
    """The adapter of a module's type, also where the module runs code of its own."""
    return next((adapter for adapter in ADAPTERS if isinstance(module, adapter.types)), None)


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


LINEAR_CALLS = ("linear", "bilinear", *(f"conv{t}{n}d" for n in "123" for t in ("", "_transpose")))
"""Functions of PyTorch that multiply by a weight."""


def own_linear(module: nn.Module) -> str | None:
    """Which of PyTorch's linear functions a class of somebody's own calls with a weight of its own; None: none.

    Looked up in the names that its forward uses; so are those of diffusers' and other packages' classes.
    """
    if type(module).__module__.startswith("torch.nn.") or not any(
        p.ndim > 1 for p in module._parameters.values() if p is not None
    ):
        return None
    code = getattr(type(module).forward, "__code__", None)
    return next((name for name in LINEAR_CALLS if code is not None and name in code.co_names), None)


def is_unsupported(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight in a way that no adapter serves."""
    return isinstance(module, (nn.Bilinear, nn.MultiheadAttention))
