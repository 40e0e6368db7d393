"""Affine quantization: scale and zero point from a range, codes from values (equations 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config.specs import QuantSpec
from modiff.quantizers.exponents import exponents
from modiff.quantizers.granularity import Partition
from modiff.quantizers.held import INT16_TOP


@dataclass(frozen=True)
class Limits:
    """Numbers of a quantizer as tensors: ``torch.compile`` would make a graph for each Python float.

    Args:
        top: Highest code, 0-dim.
        clip: Share of the range that is kept, 0-dim.
        factor: ``clip / top``, divided as Python numbers.
        symmetric: Codes -top..top; else 0..top with a zero point.
        clips: Codes can fall outside: clipped, or a range that is not the residual's own.
        codes: Lowest and highest code as Python numbers, for eager mode and for kernels of other languages.
        ratio: ``clip`` as a Python number.
        powers: 1, 2, 4 .. of scales that are powers of two times one per sample, up to the largest that codes leave
            room for in a container of 8 bits; 1 where scales are any numbers.
        free: The range need not contain 0, and the zero point may lie outside of the codes: a residual's 0 needs no
            code of its own.
        margin: By which the range of the evaluation before is widened; None: ranges are those of the evaluation itself.
    """

    top: Tensor
    clip: Tensor
    factor: Tensor
    symmetric: bool
    clips: bool
    codes: tuple[int, int]
    ratio: float
    powers: Tensor
    free: bool = False
    margin: float | None = None

    @classmethod
    def of(cls, spec: QuantSpec, like: Tensor, clip: float | None = None, fixed: bool = False) -> Limits:
        """Those of a quantizer, in the dtype and on the device of ``like``.

        Args:
            spec: The quantizer.
            like: A tensor.
            clip: Overrides ``spec.clip`` (1.0 in the first evaluation of a trajectory); ranges are then dynamic.
            fixed: Scales are calibrated.
        """
        margin = spec.margin if spec.range == "previous" and clip is None and not fixed else None
        clip, top = spec.clip if clip is None else clip, spec.code_range[1]
        made = [torch.tensor(value, dtype=like.dtype, device=like.device) for value in (top, clip, clip / top)]
        spare = spec.spare_bits if spec.scales == "power_of_two" else 0
        powers = torch.tensor([2.0**e for e in range(spare + 1)], dtype=like.dtype, device=like.device)
        clips = clip < 1 or fixed
        numbers = (spec.symmetric, clips, spec.code_range, clip, powers)
        return cls(made[0], made[1], made[2], *numbers, margin=margin)

    def scale(self, low: Tensor, high: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scale, and zero point of an asymmetric quantizer, from the smallest and largest values.

        Args:
            low: Smallest values, any shape, float.
            high: Largest values, same shape.
            step: Of which every scale must be a whole multiple, so that codes change an int16 â exactly.

        Returns:
            Scale (0 becomes 1; so do subnormal scales, which devices may flush to 0) and zero point (float holding
            whole numbers; None when symmetric), in the shape of ``low``.
        """
        smallest = torch.finfo(low.dtype).tiny
        if self.symmetric:
            scale = torch.maximum(-low, high) * self.factor
            return self._whole_steps(scale.masked_fill_(scale < smallest, 1.0), step), None
        if self.free:
            return self._free_scale(low, high, step)
        low, high = low.clamp(max=0) * self.clip, high.clamp(min=0) * self.clip
        scale = (high - low) / self.top
        scale = self._whole_steps(scale.masked_fill_(scale < smallest, 1.0), step)
        return scale, torch.minimum((-low / scale).round_().clamp_(min=0), self.top)

    def scale_after(
        self, low: Tensor, high: Tensor, last: Tensor, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`scale` of the range of the evaluation before, widened; of this one's where that does not hold it.

        So nothing is clipped that would not be with a range of its own.

        Args:
            low: Smallest values of this evaluation.
            high: Largest values.
            last: The range of the evaluation before: lowest, highest, and 1 where there are such, else 0. Replaced by
                this one's.
            step: As for :meth:`scale`.
        """
        assert self.margin is not None
        before = (exchanged if torch.compiler.is_compiling() else exchange)(last, low, high)
        least, most = before[0] * self.margin, before[1] * self.margin
        if self.symmetric:
            fits = torch.maximum(-low, high) <= torch.maximum(-least, most)
        else:
            fits = (low.clamp(max=0) >= least.clamp(max=0)) & (high.clamp(min=0) <= most.clamp(min=0))
        fits = fits & (before[2] > 0)
        wide, own = self.scale(least, most, step), self.scale(low, high, step)
        zero_point = None if wide[1] is None or own[1] is None else torch.where(fits, wide[1], own[1])
        return torch.where(fits, wide[0], own[0]), zero_point

    def _free_scale(self, low: Tensor, high: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a range that need not contain 0.

        Clipping moves the ends towards the number of the range that is nearest to 0. The scale is at least ``2^-15`` of
        the largest magnitude, so that the zero point stays a whole number that floats hold, and a constant is kept.
        """
        nearest = torch.minimum(torch.maximum(torch.zeros_like(low), low), high)
        low, high = nearest + self.clip * (low - nearest), nearest + self.clip * (high - nearest)
        scale = torch.maximum((high - low) / self.top, torch.maximum(-low, high) / 2**15)
        scale = self._whole_steps(scale.masked_fill_(scale < torch.finfo(low.dtype).tiny, 1.0), step)
        return scale, (-low / scale).round_()

    def shared_scale(
        self, low: Tensor, high: Tensor, partition: Partition, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Scales that are powers of two times one per sample (:mod:`modiff.quantizers.exponents`).

        Args:
            low: Smallest values of each sample and channel.
            high: Largest values, same shape.
            partition: Says which of them share a scale.
            step: As for :meth:`scale`; the smallest scale is a whole multiple of it, rounded up, and so are all.

        Returns:
            Scale, zero point (None when symmetric), and the power that takes codes into the container, all in the shape
            of ``low``; and the unit of the container, so that ``scale = unit * power``.
        """
        if self.symmetric:
            own = torch.maximum(-low, high) * self.factor
        else:
            low, high = low.clamp(max=0) * self.clip, high.clamp(min=0) * self.clip
            own = (high - low) / self.top
        most = len(self.powers) - 1
        unit = partition.largest(own) / self.powers[most]
        unit = torch.where(unit < torch.finfo(low.dtype).tiny, 1.0, unit)
        if step is not None:
            largest = (2 * INT16_TOP / (self.top * self.powers[most])).ceil()
            unit = torch.minimum((unit / step).ceil().clamp(min=1), largest) * step
        power = self.powers[most - exponents(own, unit * self.powers[most], most).long()]
        scale = unit * power
        zero_point = None if self.symmetric else torch.minimum((-low / scale).round_().clamp_(min=0), self.top)
        return scale, zero_point, power, unit

    def calibrated(self, scale: Tensor, zero_point: Tensor | None, step: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A calibrated scale in whole steps; the zero point follows (trap 6), since low is ``-scale * zero_point``."""
        rounded = self._whole_steps(scale, step)
        if zero_point is None or step is None:
            return rounded, zero_point
        return rounded, (scale * zero_point / rounded).round()

    def clamp_(self, codes: Tensor) -> Tensor:
        """Bring codes between the lowest and the highest one, in place where no graph is traced."""
        if not torch.compiler.is_compiling():  # with tensors as bounds PyTorch's clamp takes 20 times as long
            return codes.clamp_(*self.codes)
        return torch.maximum(torch.minimum(codes, self.top), -self.top if self.symmetric else 0 * self.top)

    def _whole_steps(self, scale: Tensor, step: Tensor | None) -> Tensor:
        """The nearest scale that is a whole multiple of a step; the largest spans all that an int16 â can hold."""
        if step is None:
            return scale
        return torch.minimum((scale / step).round().clamp(min=1), (2 * INT16_TOP / self.top).ceil()) * step


def exchange(last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The range of the evaluation before, in whose place this one's is kept.

    Args:
        last: Lowest, highest, and 1 where there are such.
        low: Of this evaluation.
        high: Likewise.
    """
    before = last.clone()
    last.copy_(torch.stack((low, high, torch.ones_like(low))))
    return before


exchanged = torch.library.custom_op("modiff::exchanged", exchange, mutates_args=("last",))
"""The same as an operator of its own, whose order graphs keep."""


@exchanged.register_fake
def _(last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(last)


def frees_zero(spec: QuantSpec) -> bool:
    """Whether residuals of a quantizer get ranges that need not contain 0 (:attr:`Limits.free`).

    Where it was measured to be better (CHANGELOG): few codes, for small sets, which often are one-sided. Those of whole
    samples never are; and zero points within the codes are what integer products take.
    """
    small = spec.granularity in ("channel", "sample_channel", "group") and getattr(spec, "scales", "real") == "real"
    return small and not spec.symmetric and spec.bits < 4


def scale_from_range(
    low: Tensor, high: Tensor, spec: QuantSpec, clip: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """:meth:`Limits.scale` of a quantizer; ``clip`` overrides ``spec.clip``."""
    return Limits.of(spec, low, clip).scale(low, high)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of ``x`` (equation 4), as floats holding whole numbers; rounds half to even.

    ``scale`` and ``zero_point`` broadcast against ``x``.
    """
    codes = (x / scale).round_()
    if zero_point is not None:
        codes += zero_point
    return codes.clamp_(*spec.code_range)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Values of codes (equation 5)."""
    return codes * scale if zero_point is None else (codes - zero_point) * scale


def fake_quantize(x: Tensor, partition: Partition, spec: QuantSpec, clip: float | None = None) -> Tensor:
    """``Q(x)``: quantize and dequantize with a dynamic range."""
    scale, zero_point = scale_from_range(*partition.range(x), spec, clip)
    scale = partition.expand(scale, x.shape)
    zero_point = None if zero_point is None else partition.expand(zero_point, x.shape)
    return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point)
