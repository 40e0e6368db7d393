"""The Triton backend: int8 products on NVIDIA GPUs, with everything element-wise in one or two passes around them."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modiff.kernels.backend import (
    Encoded,
    Held,
    OperatorShape,
    Prepared,
    Quantizer,
    integer_obstacle,
    output_scale,
    register,
)
from modiff.kernels.triton import support
from modiff.kernels.triton.tables import COLUMN_PADDING
from modiff.quantizers.packing import PackedWeight

DEPTH_MULTIPLE = 32
"""Of the channels of codes: one tensor-core instruction sums so many. Others are filled up with zeros."""


def load_library() -> None:
    """Register the operators. That imports Triton, so it waits until an operator is prepared for them."""
    importlib.import_module("modiff.kernels.triton.library")


@dataclass(frozen=True)
class Weight:
    """A weight in the order of the products.

    Args:
        codes: int8 ``[padded columns, padded channels]``, or ``[padded columns, height, width, padded channels]``.
        scale: float32 ``[columns]``.
    """

    codes: Tensor
    scale: Tensor


class Plan(NamedTuple):
    """How an input and its codes lie in memory.

    Args:
        pads: Zeros above, below, left and right.
        channels: Of the codes.
    """

    pads: tuple[int, int, int, int]
    channels: int

    @classmethod
    def of(cls, shape: OperatorShape) -> Plan:
        """That of an operator's input."""
        edges = [(0, 0)] * (2 - len(shape.padding)) + list(shape.padding)
        return cls((*edges[0], *edges[1]), padded_channels(shape.in_channels))


def padded_channels(channels: int) -> int:
    """Channels of the codes.

    >>> padded_channels(48), padded_channels(320)
    (64, 320)
    """
    return -(-channels // DEPTH_MULTIPLE) * DEPTH_MULTIPLE


@register(speed=4.0)
class TritonBackend:
    """Triton's kernels; see :class:`modiff.kernels.backend.Backend`."""

    name = "triton"
    reads_half = True  # inputs of encode and advance may be float16 or bfloat16
    returns_state = True  # advance returns ô itself
    devices = ("cuda", "cpu") if support.interpreted() else ("cuda",)

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What is in the way, first of the device, then of the operator."""
        if dtype == torch.float64:
            return "float64 models are simulated"
        return (
            support.device_obstacle(device)
            or integer_obstacle(shape, quantizer)
            or support.shape_obstacle(shape, quantizer)
        )

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """Channels last, filled up with zeros where a block would read beyond."""
        load_library()
        quantized = weight.unpack()
        codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
        codes = codes.to(torch.int8)
        columns, channels = codes.shape[:2]
        room = (-columns % COLUMN_PADDING, padded_channels(channels) - channels)
        if shape.kind == "linear":
            codes = F.pad(codes, (0, room[1], 0, room[0]))
        else:
            codes = codes.unsqueeze(2) if codes.ndim == 3 else codes  # a Conv1d is a Conv2d of height 1
            codes = F.pad(codes.permute(0, 2, 3, 1), (0, room[1], 0, 0, 0, 0, 0, room[0]))
        scale = weight.scale.reshape(-1).float().expand(columns).contiguous()
        layout = torch.channels_last if len(shape.kernel) == 2 else None
        return Prepared(shape, Weight(codes.contiguous(), scale), layout)

    def encode(self, a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
        """Codes in the shape and layout of the input, without a border: for operators that share them."""
        if held is not None and held.a_hat.stride() != a.stride():
            a = torch.empty_like(held.a_hat, dtype=a.dtype).copy_(a)
        elif held is None and not _is_dense(a):
            a = a.contiguous()
        per = _per(quantizer)
        image = _in_memory_order(a, per)
        state = None if held is None else _in_memory_order(held.a_hat, per)
        plan = Plan((0, 0, 0, 0), image.shape[3])
        codes, scale, probe = self._encode(image, state, held, quantizer, plan)
        shaped = codes.as_strided(a.shape, a.stride())
        return Encoded(shaped, 0, scale.view(_scale_shape(scale, a, per)), probe)

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """One kernel; codes that lack their border get it before, by a copy."""
        codes, weight, shape = encoded.codes, prepared.weight, prepared.shape
        plan = Plan.of(shape)
        if shape.kind == "linear":
            rows = F.pad(codes, (0, plan.channels - shape.in_channels)).reshape(-1, plan.channels)
            found = torch.ops.modiff.triton_product(rows, weight.codes, weight.scale, None, None, 1, shape.out_channels)
            return found.view(*codes.shape[:-1], shape.out_channels)
        image = _image(codes, shape)
        above, below, left, right = plan.pads
        image = F.pad(image, (0, plan.channels - shape.in_channels, left, right, above, below)).contiguous()
        stride = shape.stride[0]
        found = torch.ops.modiff.triton_product(
            image, weight.codes, weight.scale, None, None, stride, shape.out_channels
        )
        return _from_image(found, codes.ndim, shape)

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """Equation (14), in the memory of the product."""
        assert encoded.scale is not None
        total = product.mul_(output_scale(encoded.scale, product)).add_(o_hat)
        o_hat.copy_(total)
        return total

    def multiply_into(self, prepared: Prepared, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """One kernel for a Linear, whose codes other operators made; a convolution's get their border before."""
        shape, weight = prepared.shape, prepared.weight
        target = o_hat.view(-1, shape.out_channels) if shape.kind == "linear" else None
        if target is None or encoded.scale is None:
            self.update(self.multiply(prepared, encoded), encoded, o_hat)
            return o_hat
        channels = Plan.of(shape).channels
        rows = F.pad(encoded.codes, (0, channels - shape.in_channels)).reshape(-1, channels)
        torch.ops.modiff.triton_product_(target, rows, weight.codes, weight.scale, encoded.scale.reshape(-1), 1)
        _count_write(o_hat)
        return o_hat

    def advance(
        self, a: Tensor, held: Held, prepared: Prepared, quantizer: Quantizer, o_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two kernels where the scale is known or per token, else four: range, scale, codes, product with ô.

        What is returned is ô itself.
        """
        shape, weight = prepared.shape, prepared.weight
        per, is_linear = _per(quantizer), shape.kind == "linear"
        image, state = (_tokens(x, per) if is_linear else _image(x, shape) for x in (a, held.a_hat))
        target = o_hat.view(-1, shape.out_channels) if is_linear else _image(o_hat, shape)
        if not target.is_contiguous() or not _is_image(state):
            encoded = self.encode(a, held, quantizer)
            self.update(self.multiply(prepared, encoded), encoded, o_hat)
            return o_hat, encoded.probe
        image = image if _is_image(image) else image.contiguous()
        codes, scale, probe = self._encode(image, state, held, quantizer, Plan.of(shape))
        codes = codes.view(-1, codes.shape[3]) if is_linear else codes
        stride = 1 if is_linear else shape.stride[0]
        torch.ops.modiff.triton_product_(target, codes, weight.codes, weight.scale, scale, stride)
        _count_write(o_hat)
        return o_hat, probe

    def _encode(
        self, image: Tensor, state: Tensor | None, held: Held | None, quantizer: Quantizer, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        grid = None if held is None or held.grid is None else held.grid
        limits, fixed = quantizer.limits, quantizer.fixed
        scale, zero = (None, None) if fixed is None else (None if t is None else t.reshape(-1) for t in fixed)
        if scale is not None and grid is not None:
            scale, zero = limits.calibrated(scale, zero, grid.step)
        codes, found, probe, _, _ = torch.ops.modiff.triton_quantize(
            image,
            state,
            None if grid is None else grid.step,
            None if grid is None else grid.center,
            scale,
            zero,
            None,
            _per(quantizer),
            plan.pads,
            plan.channels,
            limits.codes[1],
            limits.ratio,
            limits.symmetric,
            limits.clips,
            True if held is None else held.compensates,
            False,
        )
        return codes, found if scale is None else scale, probe


def _count_write(o_hat: Tensor) -> None:
    """PyTorch does not see what kernels write."""
    if not (torch.compiler.is_compiling() or o_hat.is_inference()):
        torch.autograd.graph.increment_version(o_hat)


def _per(quantizer: Quantizer) -> int:
    """Which elements share a scale, by the numbers of :mod:`modiff.kernels.triton.launch`."""
    if quantizer.fixed is not None or not quantizer.partition.keep:  # an input without a batch is one sample
        return 0
    return ("tensor", "sample", "token").index(quantizer.spec.granularity)


def _tokens(a: Tensor, per: int) -> Tensor:
    """The input of a Linear as ``[samples, 1, rows, channels]``."""
    samples = a.shape[0] if per == 1 and a.ndim > 1 else 1
    return a.reshape(samples, 1, -1, a.shape[-1])


def _image(a: Tensor, shape: OperatorShape) -> Tensor:
    """A view of a convolution's input or output as ``[samples, height, width, channels]``."""
    batched = a if shape.is_batched(a.ndim) else a.unsqueeze(0)
    batched = batched.unsqueeze(2) if len(shape.kernel) == 1 else batched
    return batched.permute(0, 2, 3, 1)


def _from_image(image: Tensor, ndim: int, shape: OperatorShape) -> Tensor:
    """The inverse of :func:`_image`, for a tensor with ``ndim`` dims."""
    found = image.permute(0, 3, 1, 2)
    found = found.squeeze(2) if len(shape.kernel) == 1 else found
    return found if shape.is_batched(ndim) else found.squeeze(0)


def _is_image(image: Tensor) -> bool:
    """Whether the kernels can read it as it lies: channels last, or pixels last."""
    return image.is_contiguous() or image.permute(0, 3, 1, 2).is_contiguous()


def _is_dense(a: Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order."""
    return torch.empty_like(a, device="meta").stride() == a.stride()


def _in_memory_order(a: Tensor, per: int) -> Tensor:
    """A dense tensor as ``[samples, 1, rows, channels]``, where only samples and tokens have a meaning."""
    order = sorted(range(a.ndim), key=lambda d: (-a.stride()[d], d))
    flat = a.permute(order)
    if per == 2:
        return flat.reshape(1, 1, -1, a.shape[-1])
    samples = a.shape[0] if per == 1 and a.ndim > 1 else 1
    size = a.numel() // max(samples, 1)
    return flat.reshape(samples, 1, -1, math.gcd(size, 128))


def _scale_shape(scale: Tensor, a: Tensor, per: int) -> list[int]:
    """The shape in which a scale broadcasts against the input."""
    if per == 2:
        return [*a.shape[:-1], 1]
    return [scale.numel(), *[1] * (a.ndim - 1)]
