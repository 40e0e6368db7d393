"""What PyTorch and ``torch.compile`` see of the C++ operators: handles of prepared weights, and shapes of results."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from modiff.kernels.fused import After, Before

NO_PROLOGUE = (0, 0, 0)
NORMS = {None: 0, "group": 1, "layer": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3, "geglu": 4}


class Weight:
    """A weight packed for the C++ operators; freed with its owner.

    Args:
        codes: int8 ``[out, in / groups, (height, width)]``, the zero point taken off.
        scale: float32 ``[out]``.
        packed: The same as oneDNN wants it, where the product is oneDNN's.
        stride: Of a convolution, two numbers, like padding and dilation; empty for a Linear.
        padding: Of zeros, the same at both ends of a dim.
        dilation: Of a convolution.
        groups: Likewise.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        packed: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        args = (codes.contiguous(), scale.contiguous(), packed, stride, padding, dilation, groups)
        self.number: int = torch.ops.modiff.cpp_prepare(*args)
        self.linear = codes.ndim == 2
        self.shape = tuple(codes.shape)
        self.geometry = (stride, padding, dilation)
        _SHAPES[self.number] = (self.linear, self.shape, self.geometry)
        weakref.finalize(self, _release, self.number)


_SHAPES: dict[int, tuple[bool, tuple[int, ...], tuple[list[int], list[int], list[int]]]] = {}


def _release(number: int) -> None:
    _SHAPES.pop(number, None)
    torch.ops.modiff.cpp_release(number)


def before_arguments(before: Before) -> tuple[Any, ...]:
    """As the operators take what stands before."""
    kinds = (NORMS[before.norm], ACTIVATIONS[before.activation], before.groups)
    return kinds, before.mul, before.add, before.shift, before.eps


def after_arguments(after: After) -> tuple[Any, ...]:
    """As the operators take what follows, in one pass with the accumulation."""
    kind = -1 if after.dtype is None else int(after.dtype == torch.bfloat16)
    return after.residual, after.gate, after.factor, kind


def output_size(number: int, x: Tensor) -> list[int]:
    """Shape of the product of weight ``number`` with an input."""
    linear, shape, geometry = _SHAPES[number]
    if linear:
        return [*x.shape[:-1], shape[0]]
    sizes = [
        (x.shape[2 + d] + 2 * padding - dilation * (shape[2 + d] - 1) - 1) // stride + 1
        for d, (stride, padding, dilation) in enumerate(zip(*geometry, strict=True))
    ]
    return [x.shape[0], shape[0], *sizes]


def _fake_output(number: int, x: Tensor, out_type: int) -> Tensor:
    if out_type < 0:
        return x.new_empty([0], dtype=torch.float32)
    size = output_size(number, x)
    layout = torch.contiguous_format if _SHAPES[number][0] else torch.channels_last
    dtype = torch.bfloat16 if out_type == 1 else torch.float32
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=layout)


def _sets(x: Tensor, granularity: int, linear: bool) -> int:
    if granularity == 0:
        return 1
    if granularity == 1:
        return 1 if linear and x.ndim < 2 else int(x.shape[0])
    return int(x.shape[:-1].numel())


def _fake_advance(handle: int, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    granularity, out_type = args[5][2], args[-1]
    scale = x.new_empty([_sets(x, granularity, _SHAPES[handle][0])], dtype=torch.float32)
    return _fake_output(handle, x, out_type), scale, x.new_empty([], dtype=torch.float32)


def _fake_encode(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    granularity, linear = args[5][2], args[7]
    sets = [_sets(x, granularity, linear)]
    scale, zero = (x.new_empty(sets, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, dtype=torch.uint8), scale, zero, x.new_empty([], dtype=torch.float32)


def _fake_multiply(handle: int, codes: Tensor, *args: Any) -> Tensor:
    return _fake_output(handle, codes, args[-1])


@functools.cache
def register_fakes() -> None:
    """Tell ``torch.compile`` the shapes of what the operators return; once they are loaded."""
    torch.library.register_fake("modiff::cpp_advance", _fake_advance)
    torch.library.register_fake("modiff::cpp_encode", _fake_encode)
    torch.library.register_fake("modiff::cpp_multiply", _fake_multiply)
