"""The protocol of a backend: how the products of one operator, and the element-wise work around them, are executed.

A backend never sees an operator, a student or a trajectory: plain data and tensors go in, tensors come out. The
definition of every number is :mod:`modiff.kernels.float`; another backend gives the same integers (invariant 4), and
the same floats to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from modiff.config import quant
from modiff.config.specs import Modulation, QuantSpec
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import GRANULARITIES, Partition
from modiff.quantizers.held import Held, Int16Grid
from modiff.quantizers.packing import PackedWeight

__all__ = [
    "BACKENDS",
    "Backend",
    "Encoded",
    "FixedScale",
    "Held",
    "Int16Grid",
    "OperatorShape",
    "Prepared",
    "Quantizer",
    "register",
]

FixedScale = tuple[Tensor, Tensor | None]
"""A calibrated scale and zero point (None: symmetric), each broadcasting against the input."""


@dataclass(frozen=True)
class OperatorShape:
    """What a linear operator is, as plain data.

    Args:
        kind: ``linear`` (channels in the last dim), ``conv`` or ``conv_transpose`` (channels in dim 1).
        in_channels: Of the input.
        out_channels: Of the output.
        weight: How the weight is quantized; None: it is not, and only the float backend runs the operator.
        kernel: Sizes of the kernel, one for each spatial dim; empty for ``linear``, like the next four.
        stride: Of a convolution.
        padding: Borders before and after each spatial dim.
        dilation: Of a convolution.
        output_padding: Of a transposed convolution.
        groups: Of a convolution.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    kind: Literal["linear", "conv", "conv_transpose"]
    in_channels: int
    out_channels: int
    weight: QuantSpec | None = None
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    def is_batched(self, ndim: int) -> bool:
        """Whether dim 0 of an input with ``ndim`` dims counts samples; PyTorch takes single samples too."""
        return ndim > len(self.kernel) + 1


@dataclass(frozen=True)
class Quantizer:
    """How an operator's input, or its difference to â, becomes codes.

    Args:
        spec: Bits, granularity, symmetry.
        partition: Which elements of the input share a scale.
        limits: The numbers of ``spec`` as tensors (and as Python numbers), the clip of this call among them.
        fixed: Calibrated scale and zero point; None: from the range of what is quantized.
        modulation: How the operator is modulated: the dtypes of its state, compensation; None: plain quantization.
    """

    spec: QuantSpec
    partition: Partition
    limits: Limits
    fixed: FixedScale | None = None
    modulation: Modulation | None = None

    def at(self, fixed: FixedScale | None) -> Quantizer:
        """The same with another calibrated scale."""
        return self if fixed is self.fixed else replace(self, fixed=fixed)

    @property
    def span(self) -> int:
        """The largest ``|code - zero point|``, times the largest power where scales are powers of two.

        It is 63 for 7 bits and for 6 asymmetric ones, 255 for 8 asymmetric bits, and up to 127 with powers of two.
        """
        spec = self.spec
        return spec.code_range[1] << (spec.spare_bits if spec.scales == "power_of_two" else 0)


@dataclass
class Encoded:
    """What a product takes.

    Args:
        codes: Integer codes in the shape of the input, or floating-point *values* where ``scale`` is None. They may lie
            in memory that the next call of :meth:`Backend.encode` overwrites.
        zero: The code that stands for 0: a number, or a tensor that broadcasts against ``codes``; 0 for values.
        scale: Of the codes, broadcasting against the input; constant along everything that one output sums over. None:
            ``codes`` are values, and the product needs no scale.
        probe: A scalar that is NaN or Inf where the input holds either.
    """

    codes: Tensor
    zero: int | Tensor
    scale: Tensor | None
    probe: Tensor

    def clone(self) -> Encoded:
        """The same in memory of its own."""
        return replace(self, codes=self.codes.clone())


@dataclass
class Prepared:
    """A weight as a backend wants it.

    Args:
        shape: Of the operator.
        weight: The backend's own; opaque to all others.
        layout: Memory format in which products come out; None: whatever the input's leads to. ô is kept in it.
    """

    shape: OperatorShape
    weight: Any
    layout: torch.memory_format | None = None


@runtime_checkable
class Backend(Protocol):
    """One way to execute an operator.

    One object serves all operators, so it holds nothing of any operator; :class:`Prepared` does. Its methods may be
    traced by ``torch.compile``, unless they hide behind custom operators.

    Attributes:
        name: As in ``QuantConfig.backend``.
        devices: Types of devices that it runs on, such as ``("cpu",)``; empty: all.
        reads_half: May be missing, for no: :meth:`encode` and :meth:`advance` take float16 and bfloat16 inputs.
        returns_state: May be missing, for no: :meth:`advance` returns ``o_hat`` itself.
        apply: May be missing: plain quantization in one call, with the input, the prepared weight, the quantizer and
            the bias; returns ``A(Q(a)) + bias`` in float32, and the probe.
        multiply_into: May be missing: :meth:`multiply` and :meth:`update` in one, called with the prepared weight, the
            codes and ô; returns what :meth:`advance` does.
        fused_inputs: May be missing, for none: dtypes of inputs that ``advance_fused``, ``encode_fused`` and
            ``multiply_fused`` take. These are :meth:`advance`, :meth:`encode` (of a Linear's input) and
            :meth:`multiply` with :meth:`update`, of what a norm or an activation makes of the input, and with what
            follows ô (:mod:`modiff.kernels.fused`). The state they are given lies as rows of channels.
        fuses_after: What follows ô is done in the pass that updates it; there where ``fused_inputs`` is.
    """

    name: str
    devices: tuple[str, ...]

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """Why the operator cannot run here exactly, in words that end a sentence; None where it can.

        Args:
            shape: The operator, its weight's quantization among it (not None).
            quantizer: Of its input.
            device: Of its input; one of ``devices``.
            dtype: In which differences are taken: float32, or float64.
        """

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """The weight for this backend, on the device where its codes lie.

        Called once, outside of graphs; a copy or move of the operator prepares its own. There is no bias: the operator
        adds it in the first evaluation, and never again (equation 9).
        """

    def encode(self, a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
        """Equations (4), (5) and (13): quantize ``a - â`` and advance â in place.

        Args:
            a: The input, float32 or float64, in any layout; not overwritten.
            held: â; None: ``a`` itself is quantized.
            quantizer: How.
        """

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """``A(codes - zero)`` times the scales of the weight, without the scale of the codes; of values, ``A(values)``.

        Returns:
            Float32 (float64 for float64 inputs), without bias, in memory of its own.
        """

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """Equation (14): ``ô += scale * product``.

        Args:
            product: What :meth:`multiply` returned; may be overwritten.
            encoded: Of this product.
            o_hat: ô, updated in place; the shape of ``product``, any float dtype.

        Returns:
            The new ô before it was rounded to the dtype of ``o_hat``, in memory that the caller may overwrite.
        """

    def advance(
        self, a: Tensor, held: Held, prepared: Prepared, quantizer: Quantizer, o_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """:meth:`encode`, :meth:`multiply` and :meth:`update` in one, which a backend may fuse.

        Operators that share â with others call the three instead.

        Returns:
            What :meth:`update` returns, or where ``returns_state`` ``o_hat`` itself, whose count of writes the backend
            then raises; and the probe (:class:`Encoded`).
        """


_Class = TypeVar("_Class", bound=type)

BACKENDS: dict[str, Backend] = {}
"""Backends by name, in the order in which ``auto`` asks them: the fastest first."""
_SPEEDS: dict[str, float] = {}


def register(speed: float) -> Callable[[_Class], _Class]:
    """Register a backend, which gets one object for all operators.

    Args:
        speed: Its place in the order of ``auto``: measured speed in products of the usual size, relative to the float
            backend's, which is 1.
    """

    def add(cls: _Class) -> _Class:
        backend = cls()
        if backend.name not in quant.BACKENDS:
            quant.BACKENDS.append(backend.name)
        BACKENDS[backend.name], _SPEEDS[backend.name] = backend, speed
        ordered = sorted(BACKENDS.items(), key=lambda item: -_SPEEDS[item[0]])
        BACKENDS.clear()
        BACKENDS.update(ordered)
        return cls

    return add


FACTORS_OUT = tuple(name for name, cls in GRANULARITIES.items() if cls.factors_out)
"""Granularities whose scale is the same for all inputs of an output, so that it can be applied to the sum.

With scales in powers of two so does ``sample_channel``.
"""


def integer_obstacle(
    shape: OperatorShape, quantizer: Quantizer, keeps_zero: bool = False, powers: bool = False
) -> str | None:
    """Why no product of int8 codes gives an operator's exact sums; None where one does.

    Args:
        shape: The operator.
        quantizer: Of its input.
        keeps_zero: The backend takes codes with their zero point in them, and corrects the sums.
        powers: Whether the backend encodes scales that are powers of two times one per sample.
    """
    weight, activation = shape.weight, quantizer.spec
    assert weight is not None
    if activation.scales == "power_of_two" and not powers:
        return "this backend does not encode scales in powers of two"
    if activation.scales == "real" and activation.granularity not in FACTORS_OUT:
        return f"scales per {activation.granularity} do not factor out of the sum; {', '.join(FACTORS_OUT)} do"
    if weight.granularity == "group":
        return "weight scales per group do not factor out of the sum; channel and tensor do"
    if weight.code_range[1] > 127:
        return "asymmetric 8-bit weight codes less their zero point need 9 bits; symmetric ones fit"
    if quantizer.span > 127 and not keeps_zero:
        return "asymmetric 8-bit codes less their zero point need 9 bits; symmetric ones, or fewer bits, fit"
    return None


def output_scale(scale: Tensor, product: Tensor) -> Tensor:
    """The scale of an input, to be broadcast against the output: one number for all, for each sample, or each token."""
    return scale.reshape(()) if scale.numel() == 1 and product.ndim != scale.ndim else scale
