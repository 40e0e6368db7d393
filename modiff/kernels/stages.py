"""The element-wise stages around a product: difference, range, codes, reconstruction; then scale and add.

Both are plain functions of tensors. ``torch.compile`` turns each into one pass or two over memory, by itself or inlined
into a compiled denoiser; in eager mode :mod:`modiff.kernels.simulate` does the same in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.quantizers.granularity import Partition

INT16_TOP = 32767
INT16_GROWTH = 4
"""Inputs may become this many times as large as in the first evaluation before an int16 reconstruction clips them.

Along 50 DDIM steps, a sample's largest value grows by up to 3.4, median 1.9 (packaged teacher, benchmarks/state.md).
"""


class Int16Grid(NamedTuple):
    """The values that an int16 reconstruction can hold: ``(number + center) * step``, number in -32767..32767.

    Args:
        step: 0-dim. Changes of â are whole numbers of steps, and exact.
        center: A whole number, 0-dim float; not 0 where inputs lie to one side of 0, as after SiLU.
    """

    step: Tensor
    center: Tensor

    @classmethod
    def like(cls, a: Tensor) -> Int16Grid:
        """Room for a grid, in the dtype and on the device of ``a``."""
        return cls(torch.ones((), dtype=a.dtype, device=a.device), torch.zeros((), dtype=a.dtype, device=a.device))

    def fit(self, a: Tensor) -> None:
        """Cover the range of ``a``, 0 included, with room to grow (:data:`INT16_GROWTH`); in place.

        >>> grid = Int16Grid.like(a := torch.tensor([-1.0, 0.5]))
        >>> grid.fit(a)
        >>> grid
        Int16Grid(step=tensor(9.1556e-05), center=tensor(-10922.))
        """
        low, high = a.aminmax() if a.numel() else (a.new_zeros(()), a.new_zeros(()))
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = INT16_GROWTH * (high - low) / (2 * INT16_TOP)
        usable = torch.isfinite(step) & (step >= torch.finfo(a.dtype).tiny)
        self.step.copy_(torch.where(usable, step, 1.0))
        self.center.copy_(torch.where(usable, (INT16_GROWTH / 2 * (high + low) / self.step).round(), 0.0))

    def decode(self, numbers: Tensor) -> Tensor:
        """Values of numbers, which may be int16 or held in floats."""
        return (numbers.to(self.step.dtype) + self.center) * self.step

    def encode(self, a: Tensor) -> Tensor:
        """The numbers nearest to ``a``, int16."""
        return ((a / self.step).round() - self.center).clamp(-INT16_TOP, INT16_TOP).to(torch.int16)

    def clip(self, a: Tensor) -> Tensor:
        """``a``, as far as it can be held."""
        low, high = (self.center - INT16_TOP) * self.step, (self.center + INT16_TOP) * self.step
        return torch.maximum(torch.minimum(a, high), low)


@dataclass(frozen=True)
class Limits:
    """Numbers of a quantizer as tensors: ``torch.compile`` would make a graph for each Python float.

    Args:
        top: Highest code, 0-dim.
        clip: Share of the range that is kept, 0-dim.
        factor: ``clip / top``, rounded as eager mode rounds it.
        symmetric: Codes -top..top; else 0..top with a zero point.
        clips: Codes can fall outside: clipped, or a range that is not the residual's own.
    """

    top: Tensor
    clip: Tensor
    factor: Tensor
    symmetric: bool
    clips: bool

    @classmethod
    def of(cls, spec: QuantSpec, like: Tensor, clip: float | None = None, fixed: bool = False) -> Limits:
        """Those of a quantizer, in the dtype and on the device of ``like``."""
        clip, top = spec.clip if clip is None else clip, spec.code_range[1]
        made = [torch.tensor(value, dtype=like.dtype, device=like.device) for value in (top, clip, clip / top)]
        return cls(made[0], made[1], made[2], symmetric=spec.symmetric, clips=clip < 1 or fixed)


def encode(
    a: Tensor,
    a_hat: Tensor | None,
    grid: Int16Grid | None,
    limits: Limits,
    partition: Partition | None,
    fixed: tuple[Tensor, Tensor | None] | None = None,
    compensates: bool = True,
    offset: int | None = None,
    advances: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (4), (5) and (13): the codes of ``a - â``, and ``â += Q(a - â)`` in place.

    Args:
        a: Input, float32 or float64.
        a_hat: Its reconstruction; the same shape; None: ``a`` itself is quantized.
        grid: What the numbers of ``a_hat`` are worth, where these are whole (int16, or the same as floats); None where
            they are the values themselves. Inputs that the grid cannot hold are clipped.
        limits: The quantizer.
        partition: Which elements share a scale; None: those of a row, where ``a`` is a matrix. (A partition's dims
            would be symbols to a graph with dynamic shapes.)
        fixed: Calibrated scale and zero point, broadcasting against ``a``; None: from the range of ``a - â``.
        compensates: False: ``â = a`` instead (ablation).
        offset: Return codes as uint8, this standing for 0; None: return values, ``Q(a - â)``.
        advances: False: leave â as it is, for :func:`advance`.

    Returns:
        Codes or values; the scale, broadcasting against ``a``; a scalar that is NaN or Inf where ``a`` holds either.
    """
    residual, step = a, None if grid is None else grid.step
    if a_hat is not None:
        residual = a - a_hat if grid is None else grid.clip(a) - grid.decode(a_hat)
    if fixed is None:
        if partition is None:
            low, high = residual.amin(1, keepdim=True), residual.amax(1, keepdim=True)
        else:
            low, high = partition.range(residual)
        probe = (high - low).sum()
        scale, zero_point = _scale(low, high, step, limits)
        if partition is not None:
            scale = partition.expand(scale, a.shape)
            zero_point = None if zero_point is None else partition.expand(zero_point, a.shape)
    else:
        probe = residual.sum()
        scale, zero_point = _fixed_scale(*fixed, step, limits)
    codes = (residual / scale).round()
    if zero_point is not None:
        codes = torch.minimum((codes + zero_point).clamp(min=0), limits.top) - zero_point
    elif limits.clips or step is not None:  # a scale that was rounded down leaves codes outside
        codes = torch.maximum(torch.minimum(codes, limits.top), -limits.top)
    if a_hat is not None and step is not None:
        codes = _within_int16(a_hat.to(a.dtype), codes, (scale / step).round())
        probe = a.sum()  # what was clipped may have been infinite
    if a_hat is not None and advances:
        _advance(a, a_hat, grid, codes, scale, compensates)
    if offset is None:
        return codes * scale, scale, probe
    return (codes + offset).to(torch.uint8), scale, probe


def accumulate(product: Tensor, o_hat: Tensor, scale: Tensor | None) -> None:
    """Equation (14): ``ô += scale * product`` in place, and the same into ``product``.

    Args:
        product: ``A(codes)``, or with ``scale=None`` ``A(Q(a - â))``; overwritten by the new ô.
        o_hat: ô, the same shape, any float dtype.
        scale: Of the codes, broadcasting against the product.
    """
    total = (product if scale is None else product * scale) + o_hat.to(product.dtype)
    o_hat.copy_(total)
    product.copy_(total)


def _scale(low: Tensor, high: Tensor, step: Tensor | None, limits: Limits) -> tuple[Tensor, Tensor | None]:
    """As :func:`modiff.quantizers.affine.scale_from_range`."""
    smallest = torch.finfo(low.dtype).tiny
    if limits.symmetric:
        scale = torch.maximum(-low, high) * limits.factor
        return _whole_steps(torch.where(scale < smallest, 1.0, scale), step, limits), None
    low, high = low.clamp(max=0) * limits.clip, high.clamp(min=0) * limits.clip
    scale = (high - low) / limits.top
    scale = _whole_steps(torch.where(scale < smallest, 1.0, scale), step, limits)
    return scale, torch.minimum((-low / scale).round().clamp(min=0), limits.top)


def _whole_steps(scale: Tensor, step: Tensor | None, limits: Limits) -> Tensor:
    """The nearest scale that is a whole multiple of the step: codes then change an integer â exactly.

    The largest spans all that an integer â can hold.
    """
    if step is None:
        return scale
    return torch.minimum((scale / step).round().clamp(min=1), (2 * INT16_TOP / limits.top).ceil()) * step


def _fixed_scale(
    scale: Tensor, zero_point: Tensor | None, step: Tensor | None, limits: Limits
) -> tuple[Tensor, Tensor | None]:
    """A calibrated scale in whole steps; the zero point changes with it (trap 6): low is ``-scale * zero_point``."""
    rounded = _whole_steps(scale, step, limits)
    if zero_point is None or step is None:
        return rounded, zero_point
    return rounded, (scale * zero_point / rounded).round()


def _within_int16(held: Tensor, codes: Tensor, multiple: Tensor) -> Tensor:
    """Codes nearer to 0 where rounding would take an integer â out of its 16 bits."""
    lowest, highest = ((-INT16_TOP - held) / multiple).ceil(), ((INT16_TOP - held) / multiple).floor()
    return torch.maximum(torch.minimum(codes, highest), lowest)


def _advance(a: Tensor, a_hat: Tensor, grid: Int16Grid | None, codes: Tensor, scale: Tensor, compensates: bool) -> None:
    if not compensates:
        a_hat.copy_(a if grid is None else grid.encode(a))
    else:
        a_hat.copy_(a_hat.to(a.dtype) + codes * (scale if grid is None else (scale / grid.step).round()))


@torch.library.custom_op("modiff::advance", mutates_args=("a_hat",))
def advance(a_hat: Tensor, codes: Tensor, scale: Tensor, step: Tensor | None, offset: int | None) -> None:
    """Equation (13) for codes that :func:`encode` returned without advancing: ``â += Q(a - â)`` in place.

    Behind an operator of its own: inductor (PyTorch 2.13) fails on graphs in which a difference to a tensor is kept in
    memory and that tensor is then overwritten within the same loop.

    Args:
        a_hat: As for :func:`encode`.
        codes: What it returned.
        scale: Likewise.
        step: Of its grid.
        offset: As for it.
    """
    change = codes if offset is None else (codes.to(scale.dtype) - offset).mul_(scale)
    a_hat.add_(change if step is None else (change / step).round().to(a_hat.dtype))


@advance.register_fake
def _(a_hat: Tensor, codes: Tensor, scale: Tensor, step: Tensor | None, offset: int | None) -> None:
    return None
