"""The Triton backend: int8 products on NVIDIA GPUs, with everything element-wise in one or two passes around them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

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
from modiff.kernels.fused import After, Before
from modiff.kernels.triton import support
from modiff.kernels.triton.layout import (
    SAMPLE_CHANNEL,
    TOKEN,
    Plan,
    by_channel,
    from_image,
    image,
    in_memory_order,
    is_dense,
    is_image,
    padded_channels,
    rows_merge,
    scale_shape,
    sharing,
    tokens,
)
from modiff.kernels.triton.tables import COLUMN_PADDING
from modiff.quantizers.packing import PackedWeight

NOTHING = Before()


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


@register(speed=4.0)
class TritonBackend:
    """Triton's kernels; see :class:`modiff.kernels.backend.Backend`."""

    name = "triton"
    reads_half = True  # inputs of encode and advance may be float16 or bfloat16
    returns_state = True  # advance returns ô itself
    fused_inputs = (torch.float32, torch.float16, torch.bfloat16)
    fuses_after = False  # sums with residuals are passes of PyTorch's
    devices = ("cuda", "cpu") if support.interpreted() else ("cuda",)

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What is in the way, first of the device, then of the operator."""
        if dtype == torch.float64:
            return "float64 models are simulated"
        return (
            support.device_obstacle(device)
            or integer_obstacle(shape, quantizer, powers=True)
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
        """Codes in the shape of the input, without a border: for operators that share them."""
        per = sharing(quantizer)
        if per in (TOKEN, SAMPLE_CHANNEL):
            return self._encode_by_channel(a, held, quantizer, NOTHING)
        if held is not None and held.a_hat.stride() != a.stride():
            a = torch.empty_like(held.a_hat, dtype=a.dtype).copy_(a)
        elif held is None and not is_dense(a):
            a = a.contiguous()
        rows = in_memory_order(a, per)
        state = None if held is None else in_memory_order(held.a_hat, per)
        plan = Plan((0, 0, 0, 0), rows.shape[3])
        codes, scale, probe = self._encode(rows, state, held, quantizer, plan)
        shaped = codes.as_strided(a.shape, a.stride())
        return Encoded(shaped, 0, scale.view(scale_shape(scale, a, per)), probe)

    def _encode_by_channel(self, a: Tensor, held: Held | None, quantizer: Quantizer, before: Before) -> Encoded:
        """The same where channels have a meaning: for scales that are theirs or a token's, and for norms."""
        keep, per = quantizer.partition.keep, sharing(quantizer)
        channel = keep[-1] if per == SAMPLE_CHANNEL else a.ndim - 1
        rows = by_channel(a, channel)
        rows = by_channel(a.contiguous(), channel) if rows is None else rows
        state = None if held is None else by_channel(held.a_hat, channel)
        copied = held is not None and state is None
        if held is not None and state is None:
            state = by_channel(held.a_hat.contiguous(), channel)
        assert rows is not None
        codes, scale, probe = self._encode(rows, state, held, quantizer, Plan((0, 0, 0, 0), rows.shape[3]), before)
        moved = a.movedim(channel, -1).shape
        if copied and held is not None and state is not None:
            held.a_hat.copy_(state.reshape(moved).movedim(-1, channel))
        shaped = codes.view(moved).movedim(-1, channel)
        return Encoded(shaped, 0, scale.view(scale_shape(scale, a, per)), probe)

    def encode_fused(self, x: Tensor, held: Held, quantizer: Quantizer, before: Before) -> Encoded:
        """:meth:`encode` for Linears, of an input that ``before`` makes from ``x``."""
        return self._encode_by_channel(x, held, quantizer, before)

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """One kernel; codes that lack their border get it before, by a copy."""
        codes, weight, shape = encoded.codes, prepared.weight, prepared.shape
        plan = Plan.of(shape)
        if shape.kind == "linear":
            rows = F.pad(codes, (0, plan.channels - shape.in_channels)).reshape(-1, plan.channels)
            found = torch.ops.modiff.triton_product(rows, weight.codes, weight.scale, None, None, 1, shape.out_channels)
            return found.view(*codes.shape[:-1], shape.out_channels)
        pixels = image(codes, shape)
        above, below, left, right = plan.pads
        pixels = F.pad(pixels, (0, plan.channels - shape.in_channels, left, right, above, below)).contiguous()
        stride = shape.stride[0]
        found = torch.ops.modiff.triton_product(
            pixels, weight.codes, weight.scale, None, None, stride, shape.out_channels
        )
        return from_image(found, codes.ndim, shape)

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """Equation (14), in the memory of the product."""
        assert encoded.scale is not None
        total = product.mul_(output_scale(encoded.scale, product)).add_(o_hat)
        o_hat.copy_(total)
        return total

    def multiply_into(self, prepared: Prepared, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """One kernel for a Linear, whose codes other operators made; a convolution's get their border before."""
        shape, weight = prepared.shape, prepared.weight
        if shape.kind != "linear" or encoded.scale is None or not o_hat.is_contiguous():
            self.update(self.multiply(prepared, encoded), encoded, o_hat)
            return o_hat
        channels = Plan.of(shape).channels
        rows = F.pad(encoded.codes, (0, channels - shape.in_channels)).reshape(-1, channels)
        target = o_hat.view(-1, shape.out_channels)
        torch.ops.modiff.triton_product_(target, rows, weight.codes, weight.scale, encoded.scale.reshape(-1), 1)
        _count_write(o_hat)
        return o_hat

    def multiply_fused(
        self, prepared: Prepared, encoded: Encoded, o_hat: Tensor, bias: Tensor | None, after: After
    ) -> Tensor:
        """:meth:`multiply_into`, and what follows it; of modulated operators, which have added their bias."""
        self.multiply_into(prepared, encoded, o_hat)
        return followed(o_hat, prepared.shape, after)

    def advance(
        self, a: Tensor, held: Held, prepared: Prepared, quantizer: Quantizer, o_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two kernels where the scale is known or per token, else four: range, scale, codes, product with ô.

        What is returned is ô itself.
        """
        views = _views(a, held, prepared.shape, quantizer, o_hat)
        if views is None:
            encoded = self.encode(a, held, quantizer)
            self.update(self.multiply(prepared, encoded), encoded, o_hat)
            return o_hat, encoded.probe
        return o_hat, self._advance(views, held, prepared, quantizer, NOTHING, o_hat)

    def advance_fused(
        self,
        a: Tensor,
        held: Held,
        prepared: Prepared,
        quantizer: Quantizer,
        o_hat: Tensor,
        before: Before,
        after: After,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`advance` of an input that ``before`` makes from ``a``; states lie as rows of channels.

        Returns:
            What ``after`` makes of ô, and the probe.
        """
        if before.activation == "geglu":  # by PyTorch: it halves the channels
            value, gate = a.chunk(2, dim=-1)
            a, before = value * F.gelu(gate), NOTHING
        views = _views(a, held, prepared.shape, quantizer, o_hat)
        assert views is not None
        probe = self._advance(views, held, prepared, quantizer, before, o_hat)
        return followed(o_hat, prepared.shape, after), probe

    def _advance(
        self,
        views: tuple[Tensor, Tensor, Tensor],
        held: Held,
        prepared: Prepared,
        quantizer: Quantizer,
        before: Before,
        o_hat: Tensor,
    ) -> Tensor:
        rows, state, target = views
        shape, weight = prepared.shape, prepared.weight
        codes, scale, probe = self._encode(rows, state, held, quantizer, Plan.of(shape), before)
        is_linear = shape.kind == "linear"
        codes = codes.view(-1, codes.shape[3]) if is_linear else codes
        stride = 1 if is_linear else shape.stride[0]
        torch.ops.modiff.triton_product_(target, codes, weight.codes, weight.scale, scale, stride)
        _count_write(o_hat)
        return probe

    def _encode(
        self,
        rows: Tensor,
        state: Tensor | None,
        held: Held | None,
        quantizer: Quantizer,
        plan: Plan,
        before: Before = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grid = None if held is None or held.grid is None else held.grid
        limits, fixed = quantizer.limits, quantizer.fixed
        scale, zero = (None, None) if fixed is None else (None if t is None else t.reshape(-1) for t in fixed)
        if scale is not None and grid is not None:
            scale, zero = limits.calibrated(scale, zero, grid.step)
        last = None if held is None or limits.margin is None or held.last is None else held.last.view(3, -1)
        codes, found, probe = torch.ops.modiff.triton_quantize(
            rows,
            state,
            None if grid is None else grid.step,
            None if grid is None else grid.center,
            scale,
            zero,
            last,
            sharing(quantizer),
            plan.pads,
            plan.channels,
            limits.codes[1],
            limits.ratio,
            limits.symmetric,
            limits.clips,
            True if held is None else held.compensates,
            len(limits.powers) - 1,
            limits.margin or 1.0,
            {None: -1, "layer": 0}.get(before.norm, before.groups),
            before.eps,
            before.mul,
            before.add,
            before.shift,
            before.activation,
        )
        return codes, found if scale is None else scale, probe


def _views(
    a: Tensor, held: Held, shape: OperatorShape, quantizer: Quantizer, o_hat: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Input, â and ô as the kernels take them; None where â or ô lies in no such order."""
    if shape.kind == "linear":
        if not (o_hat.is_contiguous() and rows_merge(held.a_hat)):
            return None
        per = sharing(quantizer)
        rows, state = (tokens(x, per) for x in (a, held.a_hat))
        target = o_hat.view(-1, shape.out_channels)
    else:
        rows, state, target = (image(x, shape) for x in (a, held.a_hat, o_hat))
    if not target.is_contiguous() or not is_image(state):
        return None
    return rows if is_image(rows) else rows.contiguous(), state, target


def followed(o_hat: Tensor, shape: OperatorShape, after: After) -> Tensor:
    """``(gate * ô + residual) * factor`` in a tensor of its own; ô itself where that is asked for."""
    if after.dtype is None or (after.lends and after.dtype == o_hat.dtype):
        return o_hat
    found = o_hat
    if after.gate is not None:
        gate = after.gate
        gate = gate.unsqueeze(1) if shape.kind == "linear" else gate[:, :, None, None]
        found = found * gate
    if after.residual is not None:
        found = found + after.residual
    if after.factor != 1:
        found = found * after.factor
    return found.to(after.dtype, copy=found is o_hat)


def _count_write(o_hat: Tensor) -> None:
    """PyTorch does not see what kernels write."""
    if not (torch.compiler.is_compiling() or o_hat.is_inference()):
        torch.autograd.graph.increment_version(o_hat)
