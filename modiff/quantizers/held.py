"""What an operator keeps of its input between evaluations: the reconstruction â, as floats or as whole int16 steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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

    def nearest(self, a: Tensor) -> Tensor:
        """The numbers nearest to ``a``, int16."""
        return ((a / self.step).round() - self.center).clamp(-INT16_TOP, INT16_TOP).to(torch.int16)

    def clip(self, a: Tensor) -> Tensor:
        """``a``, as far as it can be held."""
        low, high = (self.center - INT16_TOP) * self.step, (self.center + INT16_TOP) * self.step
        return torch.maximum(torch.minimum(a, high), low)


@dataclass
class Held:
    """The reconstruction â of an operator's input: everything in which float and int16 states differ.

    Args:
        a_hat: â in the shape of the input: floats, or whole numbers of ``grid`` (int16, or held in floats).
        grid: What the numbers of an integer ``a_hat`` are worth; None where it holds the values themselves.
        compensates: â advances by what was quantized (equation 13); False: ``â = a`` (ablation).
        last: The range of the last residual, for scales that come from it (:meth:`.affine.Limits.scale_after`);
            zeros before there is one.
    """

    a_hat: Tensor
    grid: Int16Grid | None = None
    compensates: bool = True
    last: Tensor | None = None

    @property
    def step(self) -> Tensor | None:
        """Of which every scale must be a whole multiple; None: any scale will do."""
        return None if self.grid is None else self.grid.step

    def value(self) -> Tensor:
        """â as floats."""
        return self.a_hat if self.grid is None else self.grid.decode(self.a_hat)

    def hold(self, a: Tensor) -> None:
        """``â = a`` (equation 8), to the nearest step where â is an integer; the grid is fitted anew."""
        self._forget_range()
        if self.grid is None:
            self.a_hat.copy_(a)
        else:
            self.grid.fit(a)
            self.a_hat.copy_(self.grid.nearest(a))

    def clear(self, a: Tensor) -> None:
        """``â = 0``, which every grid holds, ready to approach ``a``."""
        self._forget_range()
        if self.grid is None:
            self.a_hat.zero_()
        else:
            self.grid.fit(a)
            self.a_hat.copy_(-self.grid.center)

    def _forget_range(self) -> None:
        if self.last is not None:
            self.last.zero_()

    def difference(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """``a - â`` in memory that may be overwritten; what a grid cannot hold is clipped first.

        Args:
            a: The input.
            out: Memory for it, in the layout of ``a_hat``; an integer â makes its own.
        """
        if self.grid is not None:
            return self.grid.clip(a) - self.grid.decode(self.a_hat)
        return a - self.a_hat if out is None else torch.sub(a, self.a_hat, out=out)

    def within(self, codes: Tensor, scale: Tensor) -> Tensor:
        """``codes``, nearer to 0 where rounding would take an integer â out of its 16 bits."""
        if self.grid is None:
            return codes
        multiple, held = (scale / self.grid.step).round(), self.a_hat.to(codes.dtype)
        lowest, highest = ((-INT16_TOP - held) / multiple).ceil(), ((INT16_TOP - held) / multiple).floor()
        return torch.maximum(torch.minimum(codes, highest), lowest)

    def advance(self, a: Tensor, codes: Tensor, scale: Tensor, as_values: bool = False) -> Tensor:
        """Equation (13) in place: ``â += codes * scale``, or ``â = a`` without compensation.

        Args:
            a: The input.
            codes: Of ``a - â``, less their zero point, as floats.
            scale: Broadcasts against them; a whole multiple of ``step``.
            as_values: Return ``codes * scale`` in the memory of ``codes``, else ``codes``.
        """
        if as_values and self.compensates and self.grid is None:
            values = codes.mul_(scale)
            self.a_hat.add_(values)
            return values
        if not self.compensates:
            self.a_hat.copy_(a if self.grid is None else self.grid.nearest(a))
        elif self.grid is None:
            self.a_hat.addcmul_(codes, scale)
        else:
            self.a_hat.copy_(self.a_hat.to(codes.dtype) + codes * (scale / self.grid.step).round())
        return codes.mul_(scale) if as_values else codes
