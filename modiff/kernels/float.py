"""Floating-point products of quantized values: the definition that every other backend must meet (``simulate``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modiff.kernels.backend import Encoded, OperatorShape, Prepared, register
from modiff.kernels.elementwise import ElementwiseBackend
from modiff.kernels.transposed import native
from modiff.quantizers.packing import PackedWeight

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None, shape: OperatorShape) -> Tensor:
    """``A(x) + bias`` of an operator, as PyTorch's own module computes it.

    Args:
        x: ``[..., in]``, or ``[B, in, *spatial]`` (the batch may be missing).
        weight: ``[out, in / groups, *kernel]``, of a transposed convolution too.
        bias: ``[out]`` or None.
        shape: Of the operator.
    """
    if shape.kind == "linear":
        return F.linear(x, weight, bias)
    if shape.kind == "conv_transpose":
        return _transposed(x, weight, bias, shape)
    padding = [low for low, _ in shape.padding]
    if shape.padding_mode != "zeros":
        x, padding = F.pad(x, _last_dim_first(shape.padding), mode=shape.padding_mode), [0] * len(padding)
    elif any(low != high for low, high in shape.padding):
        x = F.pad(x, _last_dim_first(tuple((0, high - low) for low, high in shape.padding)))
    convolution = _CONVOLUTIONS[len(shape.kernel) - 1]
    output: Tensor = convolution(x, weight, bias, shape.stride, padding, shape.dilation, shape.groups)
    return output


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None, shape: OperatorShape) -> Tensor:
    transposed = _TRANSPOSED[len(shape.kernel) - 1]
    padding = [low for low, _ in shape.padding]
    weight = native(weight, shape.groups)
    output: Tensor = transposed(
        x, weight, bias, shape.stride, padding, shape.output_padding, shape.groups, shape.dilation
    )
    return output


def full_precision(x: Tensor, weight: Tensor, bias: Tensor | None, shape: OperatorShape) -> Tensor:
    """:func:`linear_map` in the dtype of ``x``, whatever autocast says, and without a gradient of the weights."""
    if torch.is_grad_enabled():  # else as it is: PyTorch picks another product for weights that require a gradient
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return linear_map(x, weight, bias, shape)
    return linear_map(x, weight, bias, shape)


@register(speed=1.0)
class FloatBackend(ElementwiseBackend):
    """Products of values in float32 (float64 for float64 models)."""

    name = "simulate"

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """The values that the codes stand for."""
        return Prepared(shape, weight.unpack().dequantize())

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """``A(values)``."""
        return full_precision(encoded.codes, prepared.weight, None, prepared.shape)


def _last_dim_first(padding: tuple[tuple[int, int], ...]) -> list[int]:
    return [size for pair in reversed(padding) for size in pair]
