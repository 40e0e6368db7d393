"""The C++ operators behind the protocol of a backend."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from modiff.kernels import onednn
from modiff.kernels.backend import (
    Encoded,
    OperatorShape,
    Prepared,
    Quantizer,
    integer_obstacle,
    output_scale,
    register,
)
from modiff.kernels.cpp import build
from modiff.kernels.cpp.operators import Weight, after_arguments, before_arguments, register_fakes
from modiff.kernels.fused import After, Before
from modiff.quantizers.held import Held
from modiff.quantizers.packing import PackedWeight

LONGEST = 2**31 // (255 * 127)
"""Most products in an exact 32-bit sum."""
PLACES = 64
"""Most places of a kernel in the products that are made here."""
NOTHING_BEFORE, NOTHING_AFTER = Before(), After()
TENSOR, SAMPLE, TOKEN = 0, 1, 2
KEPT_ZERO = -1
"""Stands for the code of 0 where codes keep their zero point, which has a value for each set."""


# Ranked below the definition, so that ``auto`` builds nothing by itself: modiff.compile asks for it by name.
@register(speed=0.5)
class CppBackend:
    """One C++ call for each evaluation of an operator: codes, product by AVX512-VNNI (else oneDNN's), accumulation."""

    name = "cpp"
    devices = ("cpu",)
    fused_inputs = (torch.float32, torch.bfloat16)
    fuses_after = True

    def zero(self, quantizer: Quantizer) -> int:
        """The code that stands for 0: the middle of 8 bits, or of 7 where only those are exact.

        Asymmetric codes of 8 bits keep their zero point: less it, they would need a ninth bit.
        """
        if quantizer.span > 127:
            return KEPT_ZERO
        return 64 if quantizer.span <= 63 and not build.vnni() else 128

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What would make the sums inexact, kinds of operators that are missing, and why there is no library."""
        found = _shape_obstacle(shape, dtype) or integer_obstacle(shape, quantizer, keeps_zero=True)
        if found is None and quantizer.limits.margin is not None:
            found = "the C++ operators take no range of the evaluation before"
        if found is not None:
            return found
        if build.problem() is not None:
            return f"the C++ operators are missing: {build.problem()}"
        if quantizer.span > 127 and not makes(shape):
            return integer_obstacle(shape, quantizer)
        register_fakes()
        if makes(shape):
            return None
        if not onednn.available():
            return "this PyTorch has no oneDNN operators for int8"
        if quantizer.span > 63 and not onednn.exact_8bit():
            return "8-bit codes saturate on this CPU, which has no VNNI; use 7 bits (6 where asymmetric)"
        return None

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """Block the codes, for the products that are made here or for oneDNN's."""
        quantized = weight.unpack()
        codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
        codes = codes.to(torch.int8)
        scale = weight.scale.reshape(-1).float().expand(weight.shape[0]).contiguous()
        stride, padding, dilation = list(shape.stride), [low for low, _ in shape.padding], list(shape.dilation)
        if codes.ndim == 3:  # a Conv1d is a Conv2d of height 1
            codes, stride, padding, dilation = codes.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        packed = None
        if not makes(shape) and shape.kind == "linear":
            packed = onednn.pack_linear(codes, scale).weight
        elif not makes(shape):
            packed = onednn.pack_conv(codes, scale, stride, padding, dilation, shape.groups).weight
        layout = torch.channels_last if len(shape.kernel) == 2 else None
        return Prepared(shape, Weight(codes, scale, packed, stride, padding, dilation, shape.groups), layout)

    def encode_fused(self, x: Tensor, held: Held | None, quantizer: Quantizer, before: Before) -> Encoded:
        """:meth:`encode` for Linears, of an input that ``before`` makes from ``x`` (contiguous, like â)."""
        kept = None if held is None else held.a_hat
        numbers = _numbers(self.zero(quantizer), quantizer, x.ndim, held)
        args = (kept, *_grid(held), *_fixed(quantizer), numbers, quantizer.limits.ratio, True)
        codes, scale, zero, probe = torch.ops.modiff.cpp_encode(x.contiguous(), *args, *before_arguments(before))
        return Encoded(codes, self._zero_of(zero, x, quantizer), _against(scale, x, quantizer), probe)

    def _zero_of(self, zero: Tensor, a: Tensor, quantizer: Quantizer) -> int | Tensor:
        """The code of 0 for all, or for each set."""
        same = self.zero(quantizer)
        return same if same != KEPT_ZERO else _against(zero, a, quantizer)

    def multiply_fused(
        self, prepared: Prepared, encoded: Encoded, o_hat: Tensor | None, bias: Tensor | None, after: After
    ) -> Tensor:
        """:meth:`multiply`, :meth:`update` and what follows in one call, for codes of :meth:`encode_fused`.

        Without ``o_hat`` (plain quantization) the bias is added in its place.
        """
        assert encoded.scale is not None
        sets = encoded.scale.numel()
        granularity = TENSOR if sets == 1 else SAMPLE if sets == encoded.codes.shape[0] else TOKEN
        total = None if o_hat is None else o_hat.float()
        args = (encoded.codes, encoded.scale.reshape(-1), *_zeros(encoded.zero, granularity), total, bias)
        after = _laid_out(after, prepared.shape)
        out = torch.ops.modiff.cpp_multiply(prepared.weight.number, *args, *after_arguments(after))
        if total is not None and o_hat is not None:
            _put_back(total, o_hat)
        return out

    def encode(self, a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
        """Equations (4), (5) and (13): codes in memory of their own."""
        like = a if held is None else held.a_hat
        x, kept = _flat(a, like), None if held is None else _flat(held.a_hat, like)
        numbers = _numbers(self.zero(quantizer), quantizer, a.ndim, held)
        args = (x, kept, *_grid(held), *_fixed(quantizer), numbers, quantizer.limits.ratio, True)
        codes, scale, zero, probe = torch.ops.modiff.cpp_encode(*args, *before_arguments(NOTHING_BEFORE))
        if kept is not None and held is not None:
            _put_back(_restore(kept, like), held.a_hat)
        zeros = self._zero_of(zero, a, quantizer)
        return Encoded(_restore(codes, like), zeros, _against(scale, a, quantizer), probe)

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """``A(codes - zero)`` times the scales of the weight, float32; of convolutions, channels last."""
        x = _image(encoded.codes, prepared.shape)
        scale, granularity = _one(), TENSOR
        if isinstance(encoded.zero, Tensor):  # a scale for each zero point
            sets = encoded.zero.numel()
            granularity = TENSOR if sets == 1 else SAMPLE if sets == x.shape[0] else TOKEN
            scale = torch.ones(sets)
        args = (x, scale, *_zeros(encoded.zero, granularity), None, None, *after_arguments(NOTHING_AFTER))
        product = torch.ops.modiff.cpp_multiply(prepared.weight.number, *args)
        return _unimage(product, encoded.codes, prepared.shape)

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """Equation (14)."""
        assert encoded.scale is not None
        if product.stride() != o_hat.stride():
            product = torch.empty_like(o_hat, dtype=product.dtype).copy_(product)
        total = product.mul_(output_scale(encoded.scale, product)).add_(o_hat)
        o_hat.copy_(total)
        return total

    def advance(
        self, a: Tensor, held: Held, prepared: Prepared, quantizer: Quantizer, o_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The three in one call."""
        return self.advance_fused(a, held, prepared, quantizer, o_hat, NOTHING_BEFORE, NOTHING_AFTER)

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
        """The three in one call, with what stands before and after them.

        Args:
            a: Float32 or bfloat16: the input, or what ``before`` makes it from.
            held: Its reconstruction.
            prepared: The weight.
            quantizer: How the input is quantized.
            o_hat: ô, updated in place.
            before: Norm and activation of the input.
            after: What is returned instead of ô.
        """
        shape = prepared.shape
        x, kept, output = _image(a, shape), _image(held.a_hat, shape), _image(o_hat, shape)
        total, after = output.float(), _laid_out(after, shape)
        numbers = _numbers(self.zero(quantizer), quantizer, a.ndim, held)
        out, _, probe = torch.ops.modiff.cpp_advance(
            prepared.weight.number, x, kept, *_grid(held), *_fixed(quantizer), numbers, quantizer.limits.ratio,
            *before_arguments(before), total, None, *after_arguments(after),
        )  # fmt: skip
        _put_back(_unimage(kept, held.a_hat, shape), held.a_hat)
        _put_back(_unimage(total, o_hat, shape), o_hat)
        return (out if after.dtype is None else _unimage(out, o_hat, shape)), probe

    def apply(
        self,
        a: Tensor,
        prepared: Prepared,
        quantizer: Quantizer,
        bias: Tensor | None,
        before: Before = NOTHING_BEFORE,
        after: After = NOTHING_AFTER,
    ) -> tuple[Tensor, Tensor]:
        """Plain quantization in one call: ``A(Q(a)) + bias``, with what stands before and after it.

        Returns:
            The result, of convolutions channels last, and the probe (:class:`Encoded`).
        """
        shape = prepared.shape
        x, after = _image(a, shape), _laid_out(after, shape)
        numbers = _numbers(self.zero(quantizer), quantizer, a.ndim, None)
        out, _, probe = torch.ops.modiff.cpp_advance(
            prepared.weight.number, x, None, None, None, *_fixed(quantizer), numbers, quantizer.limits.ratio,
            *before_arguments(before), None, bias, *after_arguments(after),
        )  # fmt: skip
        return _unimage(out, a, shape), probe


def makes(shape: OperatorShape) -> bool:
    """Whether the product is made here; else it is oneDNN's, called from C++."""
    places = torch.Size(shape.kernel).numel()
    length = places * shape.in_channels // shape.groups
    return build.vnni() and shape.groups == 1 and places <= PLACES and length <= LONGEST


def _shape_obstacle(shape: OperatorShape, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return "float64 models are simulated"
    if shape.kind == "linear":
        return None
    if shape.kind == "conv_transpose":
        return "there is no transposed convolution of integers"
    if len(shape.kernel) > 2:
        return "there is no integer Conv3d"
    if shape.padding_mode != "zeros":
        return f"borders are padded by {shape.padding_mode!r}, not by zeros"
    if any(low != high for low, high in shape.padding):
        return "its padding is not the same at both ends"
    return None


@functools.cache
def _one() -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(1)


def _numbers(zero: int, quantizer: Quantizer, ndim: int, held: Held | None) -> tuple[int, ...]:
    """The quantizer as the operators take it: symmetry, highest code, sets of a scale, the code of 0, compensation."""
    keep = quantizer.partition.keep
    sets = TENSOR if not keep else SAMPLE if keep == (0,) else TOKEN
    compensates = held is None or held.compensates
    return int(quantizer.spec.symmetric), quantizer.limits.codes[1], sets, zero, int(compensates)


def _grid(held: Held | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if held is None or held.grid is None else tuple(held.grid)  # type: ignore[return-value]


def _fixed(quantizer: Quantizer) -> tuple[Tensor | None, Tensor | None]:
    if quantizer.fixed is None:
        return None, None
    scale, zero_point = quantizer.fixed
    return scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1)


def _zeros(zero: int | Tensor, granularity: int) -> tuple[Tensor | None, int, int]:
    """Zero points, sets of a scale and the code of 0 as products take them."""
    return (zero.reshape(-1), granularity, KEPT_ZERO) if isinstance(zero, Tensor) else (None, granularity, zero)


def _against(scale: Tensor, a: Tensor, quantizer: Quantizer) -> Tensor:
    """A scale for each set, broadcasting against the input."""
    return scale.reshape(quantizer.partition.range_shape(a.shape))


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the order of the memory of ``like``, as a contiguous tensor: a view where it can be."""
    return (x.movedim(1, -1) if _channels_last(like) else x).contiguous()


def _restore(x: Tensor, like: Tensor) -> Tensor:
    return x.movedim(-1, 1) if _channels_last(like) else x


def _channels_last(like: Tensor) -> bool:
    return like.ndim > 2 and not like.is_contiguous() and like.movedim(1, -1).is_contiguous()


def _image(x: Tensor, shape: OperatorShape) -> Tensor:
    """Rows of channels: a contiguous input of a Linear, an image in channels-last layout; a view where it can be."""
    if shape.kind == "linear":
        return x.contiguous()
    rank = len(shape.kernel)
    x = x if x.ndim > rank + 1 else x.unsqueeze(0)
    x = x.unsqueeze(2) if rank == 1 else x
    return x.contiguous(memory_format=torch.channels_last)


def _laid_out(after: After, shape: OperatorShape) -> After:
    """With its residual as rows of channels: what another backend or a plain layer gave may lie otherwise."""
    return after if after.residual is None else replace(after, residual=_image(after.residual, shape))


def _unimage(x: Tensor, like: Tensor, shape: OperatorShape) -> Tensor:
    """The inverse of :func:`_image`, for a tensor with the dims of ``like``."""
    if shape.kind == "linear":
        return x
    rank = len(shape.kernel)
    x = x.squeeze(2) if rank == 1 else x
    return x if like.ndim > rank + 1 else x.squeeze(0)


def _put_back(x: Tensor, kept: Tensor) -> None:
    """Copy state that had to be laid out anew into its place."""
    if x.data_ptr() != kept.data_ptr():
        kept.copy_(x)
