"""The element-wise work around a product: difference, range, codes, reconstruction; then scale and add.

Plain functions of tensors, the same in eager mode, where they work in place on scratch memory, and under
``torch.compile``, which turns each into one pass or two over memory, by itself (:mod:`modiff.kernels.compiled`) or
inlined into a compiled denoiser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.kernels.backend import Encoded, FixedScale, Held, OperatorShape, Prepared, Quantizer, output_scale
from modiff.kernels.scratch import scratch
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import Partition
from modiff.quantizers.packing import PackedWeight


def encode(
    a: Tensor,
    held: Held | None,
    limits: Limits,
    partition: Partition | None,
    fixed: FixedScale | None = None,
    zero: int | None = None,
    alone: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (4), (5) and (13): the codes of ``a - â``, and ``â += Q(a - â)`` in place.

    Args:
        a: Input, float32 or float64; dense.
        held: â; None: ``a`` itself is quantized. Inputs that its grid cannot hold are clipped.
        limits: The quantizer.
        partition: Which elements share a scale; None: those of a row, where ``a`` is a matrix. (A partition's dims
            would be symbols to a graph with dynamic shapes.)
        fixed: Calibrated scale and zero point, broadcasting against ``a``; None: from the range of ``a - â``.
        zero: Return codes as uint8, this standing for 0; None: return values, ``Q(a - â)``.
        alone: The graph that is traced holds nothing else (see :func:`advance`).

    Returns:
        Codes or values, in eager mode in scratch memory; the scale, broadcasting against ``a``; a scalar that is NaN or
        Inf where ``a`` holds either.
    """
    residual, step = _difference(a, held, limits), None if held is None else held.step
    power: Tensor | None = None
    if fixed is None and partition is not None and partition.shared is not None:
        low, high = partition.range(residual)
        probe = (high - low).sum()
        scale, zero_point, power, unit = limits.shared_scale(low, high, partition, step)
    elif fixed is None:
        low, high = _range(residual, partition)
        probe = (high - low).sum()
        scale, zero_point = _scale(low, high, limits, held)
        if partition is not None:
            scale = partition.expand(scale, a.shape)
            zero_point = None if zero_point is None else partition.expand(zero_point, a.shape)
    else:
        probe = residual.sum()  # clamping would hide an Inf
        scale, zero_point = limits.calibrated(*fixed, step)
    codes = codes_(residual, scale, zero_point, limits, limits.clips or step is not None)
    if held is not None and step is not None:
        codes = held.within(codes, scale)
        probe = a.sum()  # what was clipped may have been infinite
    if power is not None:  # from here on in units of what all of a sample's scales are multiples of
        codes, scale = codes.mul_(power), unit
    if held is None:
        return (codes.mul_(scale) if zero is None else _as_uint8(codes, zero)), scale, probe
    if torch.compiler.is_compiling() and held.compensates and not alone:
        found = codes * scale if zero is None else _as_uint8(codes, zero)
        advance(held.a_hat, found, scale, step, zero)
        return found, scale, probe
    found = held.advance(a, codes, scale, as_values=zero is None)
    return (found if zero is None else _as_uint8(found, zero)), scale, probe


def codes_(x: Tensor, scale: Tensor, zero_point: Tensor | None, limits: Limits, clips: bool) -> Tensor:
    """Equation (4) in place: the codes of ``x`` less their zero point, as floats; rounds half to even.

    Args:
        x: Values.
        scale: Broadcasts against them, like ``zero_point``.
        zero_point: None where symmetric.
        limits: Lowest and highest code.
        clips: Values can round beyond the last code: the scale is not the full range's.
    """
    codes = x.div_(scale).round_()
    if zero_point is not None:
        return limits.clamp_(codes.add_(zero_point)).sub_(zero_point)
    return limits.clamp_(codes) if clips else codes


def encode_keeping_zero(a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
    """Equations (4), (5) and (13) with asymmetric codes of 8 bits as they are: their zero point stays in them.

    Args:
        a: As for :meth:`~modiff.kernels.backend.Backend.encode`.
        held: As there.
        quantizer: As there; asymmetric.
    """
    limits, partition = quantizer.limits, quantizer.partition
    residual, step = _difference(a, held, limits), None if held is None else held.step
    if quantizer.fixed is None:
        low, high = partition.range(residual)
        probe = (high - low).sum()
        scale, zero_point = (partition.expand(t, a.shape) for t in _scale(low, high, limits, held) if t is not None)
    else:
        probe = a.sum()
        scale, fixed = limits.calibrated(*quantizer.fixed, step)
        assert fixed is not None
        zero_point = fixed
    codes = limits.clamp_(residual.div_(scale).round_().add_(zero_point)) - zero_point
    if held is not None and step is not None:
        codes, probe = held.within(codes, scale), a.sum()
    found = (codes + zero_point).to(torch.uint8)
    if held is not None:
        if torch.compiler.is_compiling() and held.compensates:
            advance(held.a_hat, codes * scale, scale, step, None)
        else:
            held.advance(a, codes, scale)
    return Encoded(found, zero_point, scale, probe)


def rescale(product: Tensor, encoded: Encoded) -> Tensor:
    """A product times the scale of its codes, in place."""
    return product if encoded.scale is None else product.mul_(output_scale(encoded.scale, product))


def update(product: Tensor, o_hat: Tensor, scale: Tensor | None) -> Tensor:
    """Equation (14): ``ô += scale * product``, in place in both; returns the new ô in the memory of ``product``.

    Args:
        product: ``A(codes)``, or with ``scale=None`` ``A(Q(a - â))``.
        o_hat: ô, the same shape, any float dtype.
        scale: Of the codes, broadcasting against the product.
    """
    total = product.add_(o_hat) if scale is None else product.mul_(scale).add_(o_hat)
    o_hat.copy_(total)
    return total


class ElementwiseBackend:
    """A backend that differs from the definition in its product only; register a subclass with ``name``.

    A subclass has :meth:`prepare` and :meth:`multiply`, and where it takes integer codes also :meth:`zero`.
    """

    name: str
    devices: tuple[str, ...] = ()

    def zero(self, quantizer: Quantizer) -> int | None:
        """The uint8 code that stands for 0; None: the product takes values."""
        return None

    def keeps_zero(self, quantizer: Quantizer) -> bool:
        """Whether codes reach the product with their zero point in them: those that less it do not fit 8 bits."""
        return False

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Nothing stands in the way."""
        return None

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """As in :class:`~modiff.kernels.backend.Backend`."""
        raise NotImplementedError

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """As in :class:`~modiff.kernels.backend.Backend`."""
        raise NotImplementedError

    def encode(self, a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
        """By :func:`encode`."""
        if self.keeps_zero(quantizer):
            return encode_keeping_zero(a, held, quantizer)
        zero = self.zero(quantizer)
        codes, scale, probe = encode(a, held, quantizer.limits, quantizer.partition, quantizer.fixed, zero)
        return Encoded(codes, zero or 0, None if zero is None else scale, probe)

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """By :func:`update`."""
        scale = None if encoded.scale is None else output_scale(encoded.scale, product)
        return update(laid_out_like(product, o_hat), o_hat, scale)

    def advance(
        self, a: Tensor, held: Held, prepared: Prepared, quantizer: Quantizer, o_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The three one after the other."""
        encoded = self.encode(a, held, quantizer)
        return self.update(self.multiply(prepared, encoded), encoded, o_hat), encoded.probe


def laid_out_like(product: Tensor, o_hat: Tensor) -> Tensor:
    """``product`` in the memory layout of ô."""
    return (
        product if product.stride() == o_hat.stride() else torch.empty_like(o_hat, dtype=product.dtype).copy_(product)
    )


def _difference(a: Tensor, held: Held | None, limits: Limits) -> Tensor:
    """``a - â``, or ``a`` itself, in memory that may be overwritten."""
    if torch.compiler.is_compiling():
        found = a.clone() if held is None else held.difference(a)
        return found if limits.margin is None else materialized(found)
    if held is None:
        return scratch(a).copy_(a)
    return held.difference(a, out=scratch(held.a_hat, a.dtype))


def _scale(low: Tensor, high: Tensor, limits: Limits, held: Held | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a dynamic range: this evaluation's, or that of the one before."""
    step = None if held is None else held.step
    if limits.margin is None or held is None or held.last is None:
        return limits.scale(low, high, step)
    return limits.scale_after(low, high, held.last, step)


def _range(residual: Tensor, partition: Partition | None) -> tuple[Tensor, Tensor]:
    if partition is None:
        return residual.amin(1, keepdim=True), residual.amax(1, keepdim=True)
    return partition.range(residual)


def _as_uint8(codes: Tensor, zero: int) -> Tensor:
    if torch.compiler.is_compiling():
        return (codes + zero).to(torch.uint8)
    return scratch(codes, torch.uint8).copy_(codes.add_(zero))


@torch.library.custom_op("modiff::materialized", mutates_args=())
def materialized(residual: Tensor) -> Tensor:
    """A copy that a graph does not compute again: inductor may do so from an â that has been overwritten meanwhile."""
    return residual.clone()


@materialized.register_fake
def _(residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


@torch.library.custom_op("modiff::advance", mutates_args=("a_hat",))
def advance(a_hat: Tensor, codes: Tensor, scale: Tensor, step: Tensor | None, zero: int | None) -> None:
    """Equation (13) in place while a denoiser is traced: ``â += Q(a - â)``.

    Behind an operator of its own: inductor (PyTorch 2.13) fails on graphs in which a difference to a tensor is kept in
    memory and that tensor is then overwritten within the same loop.

    Args:
        a_hat: Of :class:`Held`.
        codes: uint8 codes, or values where ``zero`` is None.
        scale: Broadcasts against them.
        step: Of the grid of â.
        zero: The code that stands for 0.
    """
    change = codes if zero is None else (codes.to(scale.dtype) - zero).mul_(scale)
    a_hat.add_(change if step is None else (change / step).round().to(a_hat.dtype))


@advance.register_fake
def _(a_hat: Tensor, codes: Tensor, scale: Tensor, step: Tensor | None, zero: int | None) -> None:
    return None
