"""Which execution an operator gets, and why: integers where they are exact, else floating point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.kernels import onednn
from modiff.quantizers.packing import PackedWeight

FACTORS_OUT = ("tensor", "sample", "token")
"""Granularities whose scale is the same for all inputs of an output, so that it can be applied to the sum."""


@dataclass(frozen=True)
class Choice:
    """The execution of an operator.

    Args:
        backend: ``simulate`` or ``onednn``.
        reason: Why not integers; empty where it is.
    """

    backend: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})" if self.reason else self.backend


def choose(
    module: Any, weight: QuantSpec | None, activation: QuantSpec | None, device: torch.device, dtype: torch.dtype
) -> Choice:
    """The best execution that is exact.

    Args:
        module: The original Linear or Conv.
        weight: Its weight spec.
        activation: Its activation spec.
        device: Of the input.
        dtype: In which differences are taken: float32, or float64.
    """
    reason = _obstacle(module, weight, activation, device, dtype)
    return Choice("onednn") if reason is None else Choice("simulate", reason)


def code_span(spec: QuantSpec) -> int:
    """The largest ``|code - zero point|``.

    >>> code_span(QuantSpec(7)), code_span(QuantSpec(6, symmetric=False)), code_span(QuantSpec(8, symmetric=False))
    (63, 63, 255)
    """
    return spec.code_range[1]


@dataclass
class IntegerProduct:
    """The integer product of one operator; packed at its first call, and again in a copy of the operator.

    Args:
        module: The original: its geometry.
        packed: Its quantized weight.
        activation: Decides how the codes are offset.
    """

    module: Any
    packed: PackedWeight
    activation: QuantSpec
    handle: onednn.Handle = field(default_factory=onednn.Handle)

    @property
    def offset(self) -> int:
        """The unsigned code that stands for 0."""
        return onednn.OFFSETS[code_span(self.activation) <= 63]

    @property
    def is_linear(self) -> bool:
        """Linear, else a convolution."""
        return isinstance(self.module, torch.nn.Linear)

    def prepare(self) -> None:
        """Pack the weight, if that is not done."""
        if self.handle.packed is not None:
            return
        quantized = self.packed.unpack()
        codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
        codes = codes.to(torch.int8)
        scale = self.packed.scale.reshape(-1).float().expand(self.packed.shape[0]).contiguous()
        if self.is_linear:
            self.handle.put(onednn.pack_linear(codes, scale))
            return
        stride, padding, dilation = _geometry(self.module)
        if codes.ndim == 3:  # a Conv1d is a Conv2d of height 1
            codes, stride, padding, dilation = codes.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        packed = onednn.pack_conv(codes, scale, stride, padding, dilation, self.module.groups, self.offset)
        self.handle.put(packed)

    def __call__(self, codes: Tensor) -> Tensor:
        """``A(codes - offset)`` times the scales of the weight, float32, without the scale of the codes.

        Args:
            codes: uint8, of the shape of the operator's input, in any layout.
        """
        out = self.packed.shape[0]
        if self.is_linear:
            return onednn.int8_linear(codes.contiguous(), self.handle.number, out, self.offset)
        rank = len(self.module.kernel_size)
        batched = codes.ndim > rank + 1
        x = codes if batched else codes.unsqueeze(0)
        x = x.unsqueeze(2) if rank == 1 else x
        x = x.contiguous(memory_format=torch.channels_last)
        y = onednn.int8_conv2d(x, self.handle.number, out, self.offset)
        y = y.squeeze(2) if rank == 1 else y
        return y if batched else y.squeeze(0)


def _obstacle(
    module: Any, weight: QuantSpec | None, activation: QuantSpec | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why oneDNN cannot give the exact sums; None where it does."""
    if weight is None or activation is None:
        return f"its {'weights' if weight is None else 'activations'} are not quantized"
    if device.type != "cpu":
        return f"oneDNN runs on the CPU, not on {device.type}"
    if dtype != torch.float32:
        return "float64 models are simulated"
    if not onednn.available():
        return "this PyTorch has no oneDNN operators for int8"
    return _granularity(weight, activation) or _widths(weight, activation) or _shape(module)


def _granularity(weight: QuantSpec, activation: QuantSpec) -> str | None:
    if activation.granularity not in FACTORS_OUT:
        return f"scales per {activation.granularity} do not factor out of the sum; {', '.join(FACTORS_OUT)} do"
    if weight.granularity == "group":
        return "weight scales per group do not factor out of the sum; channel and tensor do"
    return None


def _widths(weight: QuantSpec, activation: QuantSpec) -> str | None:
    if code_span(weight) > 127:
        return "asymmetric 8-bit weight codes less their zero point need 9 bits; symmetric ones fit"
    span = code_span(activation)
    if span > 127:
        return "asymmetric 8-bit codes less their zero point need 9 bits; symmetric ones, or fewer bits, fit"
    if span > 63 and not onednn.exact_8bit():
        return "8-bit codes saturate on this CPU, which has no VNNI; use 7 bits (6 where asymmetric)"
    return None


def _shape(module: Any) -> str | None:
    if isinstance(module, torch.nn.Linear):
        return None
    if len(module.kernel_size) > 2:
        return "there is no integer Conv3d"
    if module.padding_mode != "zeros":
        return f"borders are padded by {module.padding_mode!r}, not by zeros"
    pads = module._reversed_padding_repeated_twice
    if any(pads[i] != pads[i + 1] for i in range(0, len(pads), 2)):
        return "its padding is not the same at both ends"
    return None


def _geometry(module: Any) -> tuple[list[int], list[int], list[int]]:
    # PyTorch keeps numbers here, whether the padding was given as numbers or as 'same'; from the last dim to the first.
    pads = module._reversed_padding_repeated_twice
    padding = [pads[i] for i in range(0, len(pads), 2)][::-1]
    return list(module.stride), padding, list(module.dilation)
