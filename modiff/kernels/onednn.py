"""Integer products on the CPU by oneDNN, through PyTorch's own operators: u8 activations, s8 weights, s32 sums.

The products sit behind custom operators of ours, so that ``torch.compile`` sees one opaque call: inductor's lowering of
PyTorch's own asserts that a packed weight is a constant of the graph.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modiff.kernels.backend import Encoded, OperatorShape, Prepared, Quantizer, integer_obstacle, output_scale, register
from modiff.kernels.elementwise import ElementwiseBackend
from modiff.kernels.transposed import as_convolution, flipped, stuffed
from modiff.quantizers.packing import PackedWeight

ZEROS = {True: 64, False: 128}
"""The unsigned code that stands for 0, by whether the signed codes fit 7 bits."""


@dataclass(frozen=True)
class Packed:
    """A weight as oneDNN wants it.

    Args:
        weight: Blocked codes; opaque.
        scale: float32 ``[out]``.
        zero: int32 ``[out]``, all 0.
        geometry: Of a convolution: kernel, stride, padding and dilation, two numbers each, and groups; None: Linear.
        sums: ``A(1)``, by the size of the input.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    geometry: tuple[list[int], list[int], list[int], list[int], int] | None
    sums: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


_PACKED: dict[int, Packed] = {}
_HANDLES = itertools.count()


class Handle:
    """Owns an entry of the table of packed weights, which is removed with it.

    The custom operators take a number: a graph can hold that, but not an opaque tensor.
    """

    def __init__(self, packed: Packed) -> None:
        self.number = next(_HANDLES)
        _PACKED[self.number] = packed
        weakref.finalize(self, _PACKED.pop, self.number, None)


def pack_linear(codes: Tensor, scale: Tensor) -> Packed:
    """Pack the weight of a Linear.

    Args:
        codes: int8 ``[out, in]``, the zero point taken off.
        scale: float32 ``[out]``.
    """
    weight = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return Packed(weight, scale, torch.zeros(len(scale), dtype=torch.int32), None)


def pack_conv(
    codes: Tensor, scale: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Packed:
    """Pack the weight of a Conv2d.

    Args:
        codes: int8 ``[out, in / groups, height, width]``, the zero point taken off.
        scale: float32 ``[out]``.
        stride: Two numbers, like padding and dilation.
        padding: Of zeros, the same at both ends of a dim.
        dilation: Of the convolution, like groups.
        groups: Of the convolution.
    """
    codes = codes.contiguous()
    # The zero point only says that there will be one; each product gets its own.
    weight = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, ZEROS[False], stride, padding, dilation, groups, None)
    geometry = (list(codes.shape[2:]), stride, padding, dilation, groups)
    return Packed(weight, scale, torch.zeros(len(scale), dtype=torch.int32), geometry)


def _int8_linear(codes: Tensor, handle: int, out_features: int, zero: int) -> Tensor:
    """``scale * sum (codes - zero) weight_codes``.

    Args:
        codes: uint8 ``[..., in]``, contiguous.
        handle: Number of a :class:`Handle`.
        out_features: Of the operator.
        zero: The code that stands for 0.

    Returns:
        float32 ``[..., out]``: integer sums, each times the scale of its weight.
    """
    packed = _PACKED[handle]
    output: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero, packed.weight, packed.scale, packed.zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return output


def _fake_linear(codes: Tensor, handle: int, out_features: int, zero: int) -> Tensor:
    return torch.empty(*codes.shape[:-1], out_features, dtype=torch.float32, device=codes.device)


def _int8_conv2d(codes: Tensor, handle: int, out_channels: int, zero: int) -> Tensor:
    """The convolution of ``codes - zero`` with the weight's codes, times the weight's scales.

    Args:
        codes: uint8 ``[B, C, H, W]``, channels last.
        handle: Number of a :class:`Handle`.
        out_channels: Of the operator.
        zero: The code that stands for 0; so do the padded borders.

    Returns:
        float32 ``[B, out, H', W']``, channels last.
    """
    packed = _PACKED[handle]
    assert packed.geometry is not None
    _, stride, padding, dilation, groups = packed.geometry
    output: Tensor = torch.ops.onednn.qconv2d_pointwise(
        codes,
        1.0,
        zero,
        packed.weight,
        packed.scale,
        packed.zero,
        None,
        stride,
        padding,
        dilation,
        groups,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return output.contiguous(memory_format=torch.channels_last)


def _fake_conv2d(codes: Tensor, handle: int, out_channels: int, zero: int) -> Tensor:
    packed = _PACKED[handle]
    assert packed.geometry is not None
    kernel, stride, padding, dilation, _ = packed.geometry
    size = [
        (codes.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(2)
    ]
    output = torch.empty(codes.shape[0], out_channels, *size, dtype=torch.float32, device=codes.device)
    return output.contiguous(memory_format=torch.channels_last)


def _int8_sums(one: Tensor, handle: int, out_channels: int) -> Tensor:
    """``A(1)`` times the weight's scales: what a product gives for codes that are all 1. Kept for each size.

    Args:
        one: uint8 of an input's shape with a batch of 1; its values do not matter.
        handle: Number of a :class:`Handle`.
        out_channels: Of the operator.
    """
    packed = _PACKED[handle]
    key = tuple(one.shape[1:])
    if key not in packed.sums:
        ones = torch.ones(one.shape, dtype=torch.uint8)
        if packed.geometry is None:
            packed.sums[key] = _int8_linear(ones, handle, out_channels, 0)
        elif one.ndim == 3:
            packed.sums[key] = _int8_conv2d(ones.unsqueeze(2), handle, out_channels, 0).squeeze(2)
        else:
            ones = ones.contiguous(memory_format=torch.channels_last)
            packed.sums[key] = _int8_conv2d(ones, handle, out_channels, 0)
    return packed.sums[key].clone()


def _fake_sums(one: Tensor, handle: int, out_channels: int) -> Tensor:
    if _PACKED[handle].geometry is None:
        return _fake_linear(one, handle, out_channels, 0)
    if one.ndim == 3:
        return _fake_conv2d(one.unsqueeze(2), handle, out_channels, 0).squeeze(2)
    return _fake_conv2d(one, handle, out_channels, 0)


# Defined piece by piece: torch.library.custom_op wraps each call in Python code for gradients, ten times as slow.
_LIBRARY = torch.library.Library("modiff", "FRAGMENT")
_LIBRARY.define("int8_sums(Tensor one, int handle, int out_channels) -> Tensor")
_LIBRARY.impl("int8_sums", _int8_sums, "CPU")
torch.library.register_fake("modiff::int8_sums", _fake_sums, lib=_LIBRARY)
for _name, _out, _run, _fake in (
    ("int8_linear", "out_features", _int8_linear, _fake_linear),
    ("int8_conv2d", "out_channels", _int8_conv2d, _fake_conv2d),
):
    _LIBRARY.define(f"{_name}(Tensor codes, int handle, int {_out}, int zero) -> Tensor")
    _LIBRARY.impl(_name, _run, "CPU")
    torch.library.register_fake(f"modiff::{_name}", _fake, lib=_LIBRARY)
int8_sums = torch.ops.modiff.int8_sums.default
int8_linear = torch.ops.modiff.int8_linear.default
int8_conv2d = torch.ops.modiff.int8_conv2d.default


@functools.cache
def available() -> bool:
    """Whether this PyTorch has the operators, on a CPU that oneDNN knows."""
    try:
        pack_linear(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))
    except (RuntimeError, AttributeError):
        return False
    return True


@functools.cache
def exact_8bit() -> bool:
    """Whether products of 8-bit codes are exact here: without VNNI, sums of two saturate at 16 bits (trap 11).

    Found by trying: the largest codes, whose pairs overflow 16 bits, against 64-bit integers.
    """
    if not available():
        return False
    codes = torch.full((4, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    handle = Handle(pack_linear(weight, torch.ones(16)))
    linear = torch.equal(int8_linear(codes, handle.number, 16, 0), torch.full((4, 16), 255.0 * 127 * 64))
    codes = codes.reshape(4, 64, 1, 1).expand(4, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    handle = Handle(pack_conv(weight.reshape(16, 64, 1, 1), torch.ones(16), [1, 1], [0, 0], [1, 1], 1))
    conv = torch.equal(int8_conv2d(codes, handle.number, 16, 0), torch.full((4, 16, 4, 4), 255.0 * 127 * 64))
    return linear and conv


@register(speed=2.0)
class OneDNN(ElementwiseBackend):
    """Products of 8-bit integers by oneDNN."""

    name = "onednn"
    devices = ("cpu",)

    def zero(self, quantizer: Quantizer) -> int:
        """The middle of 7 bits, or of 8."""
        return ZEROS[quantizer.span <= 63]

    def keeps_zero(self, quantizer: Quantizer) -> bool:
        """Asymmetric 8-bit codes less their zero point need 9 bits."""
        return quantizer.span > 127

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What would make the sums inexact, and kinds of operators that oneDNN does not have."""
        if dtype != torch.float32:
            return "float64 models are simulated"
        if not available():
            return "this PyTorch has no oneDNN operators for int8"
        keeps_zero = shape.kind != "conv_transpose"
        reason = integer_obstacle(shape, quantizer, keeps_zero, powers=True)
        if reason is not None:
            return reason
        if quantizer.span > 63 and not exact_8bit():
            return "8-bit codes saturate on this CPU, which has no VNNI; use 7 bits (6 where asymmetric)"
        return _shape_obstacle(shape)

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """Block the codes."""
        quantized = weight.unpack()
        codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
        codes = codes.to(torch.int8)
        scale = weight.scale.reshape(-1).float().expand(weight.shape[0]).contiguous()
        if shape.kind == "linear":
            return Prepared(shape, Handle(pack_linear(codes, scale)))
        if shape.kind == "conv_transpose":
            packed = self._pack_conv(flipped(codes), scale, as_convolution(shape))
        else:
            packed = self._pack_conv(codes, scale, shape)
        return Prepared(shape, Handle(packed), torch.channels_last if len(shape.kernel) == 2 else None)

    def _pack_conv(self, codes: Tensor, scale: Tensor, shape: OperatorShape) -> Packed:
        stride, padding, dilation = list(shape.stride), [low for low, _ in shape.padding], list(shape.dilation)
        if codes.ndim == 3:  # a Conv1d is a Conv2d of height 1
            codes, stride, padding, dilation = codes.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        return pack_conv(codes, scale, stride, padding, dilation, shape.groups)

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """``A(codes - zero)`` times the scales of the weight, float32; of convolutions, channels last."""
        shape, number, codes = prepared.shape, prepared.weight.number, encoded.codes
        if isinstance(encoded.zero, Tensor):
            return self._multiply_keeping_zero(prepared, encoded)
        if shape.kind == "linear":
            return int8_linear(codes.contiguous(), number, shape.out_channels, encoded.zero)
        rank = len(shape.kernel)
        batched = codes.ndim > rank + 1
        x = codes if batched else codes.unsqueeze(0)
        if shape.kind == "conv_transpose":
            assert isinstance(encoded.zero, int)
            x = stuffed(x, shape, encoded.zero)
        x = x.unsqueeze(2) if rank == 1 else x
        x = x.contiguous(memory_format=torch.channels_last)
        y = int8_conv2d(x, number, shape.out_channels, encoded.zero)
        y = y.squeeze(2) if rank == 1 else y
        return y if batched else y.squeeze(0)

    def _multiply_keeping_zero(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """``A(codes - z) = A(codes - 128) + (128 - z) A(1)``, with one zero point z for each scale.

        ``A(1)`` is one number for each output channel of a Linear, and a map over the output of a padded convolution.
        """
        middle, zero_point = ZEROS[False], encoded.zero
        assert isinstance(zero_point, Tensor)
        product = self.multiply(prepared, replace(encoded, zero=middle))
        shape, codes = prepared.shape, encoded.codes
        if shape.kind == "linear":
            one = codes.new_empty(1, shape.in_channels)
        else:
            one = codes.new_empty(1, *codes.shape[-len(shape.kernel) - 1 :])
        sums = int8_sums(one, prepared.weight.number, shape.out_channels)
        if shape.kind == "linear":
            sums = sums.reshape(-1)
        elif codes.ndim == len(shape.kernel) + 1:
            sums = sums.squeeze(0)
        return product.add_((middle - output_scale(zero_point, product)) * sums)


def _shape_obstacle(shape: OperatorShape) -> str | None:
    if shape.kind == "linear":
        return None
    if len(shape.kernel) > 2:
        return "there is no integer Conv3d"
    if shape.padding_mode != "zeros":
        return f"borders are padded by {shape.padding_mode!r}, not by zeros"
    if any(low != high for low, high in shape.padding):
        return "its padding is not the same at both ends"
    return None
