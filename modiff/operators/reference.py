"""The recurrence of docs/method.md in float64, one equation after the other: for tests, and for readers.

Nothing here is shared with the fast operators but the specs: which elements share a scale is written out in label
tensors, each set is quantized by itself, and products run through a copy of the original module.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.specs import Modulation, QuantSpec
from modiff.quantizers.affine import frees_zero


class ReferenceOperator:
    """One Linear or Conv, from the first (noisiest) evaluation T of a trajectory to the last.

    Args:
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``; copied.
        weight: Weight spec or None.
        activation: Activation spec or None (then modulation has no effect).
        modulation: None: plain quantization.
        fixed: Calibrated quantizers: for each evaluation, (scale, zero point) of each set, the zero point 0 where
            symmetric; None: dynamic ranges.

    Attributes:
        a_hat: Reconstruction â of the input (the last input itself without error compensation); float64.
        o_hat: Output ô; float64.
        evaluations: How many there were.
        last: Smallest and largest value of each set of the last residual.
    """

    a_hat: Tensor
    o_hat: Tensor

    def __init__(
        self,
        module: Any,
        weight: QuantSpec | None,
        activation: QuantSpec | None,
        modulation: Modulation | None,
        fixed: Sequence[Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        self.with_bias: Any = copy.deepcopy(module).double().requires_grad_(False)
        if weight is not None:
            w = self.with_bias.weight
            w.copy_(quantize(w, weight_labels(w.shape, weight), weight, weight.clip))
        self.without_bias: Any = copy.deepcopy(self.with_bias)
        self.without_bias.bias = None
        self.activation = activation
        self.modulation = modulation
        self.fixed = fixed
        self.evaluations = 0
        self.last: dict[int, tuple[float, float]] = {}

    def evaluate(self, a: Tensor) -> Tensor:
        """The output ``[B, ...]`` (float64) of the next evaluation, whose input is ``a``."""
        a = a.double()
        t, self.evaluations = self.evaluations, self.evaluations + 1
        if self.activation is None:
            return self.with_bias(a)
        if self.modulation is None:
            return self.with_bias(self.calibrated_or_dynamic_q(a, t))
        every = self.modulation.refresh_every
        if t == 0 and self.modulation.warmup == "refine":
            self.warm_up_in_rounds(a, self.modulation.warmup_rounds)
        elif t == 0 or (every is not None and t % every == 0):
            self.warm_up(a)
        else:
            self.advance(a, t, self.modulation.error_compensation)
        return self.o_hat

    def warm_up(self, a: Tensor) -> None:
        """Full-precision activations, in the first evaluation and in refreshes."""
        self.a_hat, self.last = a, {}  # (8)
        self.o_hat = self.with_bias(self.a_hat)  # (9)

    def warm_up_in_rounds(self, a: Tensor, rounds: int) -> None:
        """The same input again and again, each time with scales of its own and without clipping (App. D.5)."""
        self.a_hat, self.last = torch.zeros_like(a), {}
        for _ in range(rounds):
            self.a_hat = self.a_hat + self.q(a - self.a_hat, clip=1.0, residual=True)  # (13) with a_t = a_T
        self.o_hat = self.with_bias(self.a_hat)  # (9)

    def advance(self, a: Tensor, t: int, error_compensation: bool) -> None:
        """Every other evaluation, of which ``t`` is the number."""
        difference = self.calibrated_or_dynamic_q(a - self.a_hat, t, residual=True)
        self.a_hat = self.a_hat + difference if error_compensation else a  # (13), or a_{t+1} of equation (6)
        self.o_hat = self.o_hat + self.without_bias(difference)  # (14)

    def calibrated_or_dynamic_q(self, x: Tensor, t: int, residual: bool = False) -> Tensor:
        """``Q(x)`` in evaluation ``t``."""
        if self.fixed is None:
            follows = residual and self.activation is not None and self.activation.range == "previous"
            return self.q_after(x) if follows else self.q(x, residual=residual)
        assert self.activation is not None
        labels = activation_labels(x.shape, self.activation, self.with_bias)
        result = torch.empty_like(x)
        for label, (scale, zero_point) in enumerate(self.fixed[t]):
            members = labels == label
            result[members] = quantize_with(x[members], scale, zero_point, self.activation)
        return result

    def q_after(self, x: Tensor) -> Tensor:
        """``Q(x)`` with the ranges of the evaluation before, widened, where they hold those of this one."""
        spec = self.activation
        assert spec is not None
        labels, margin, result = activation_labels(x.shape, spec, self.with_bias), 1 + spec.bits / 32, x.clone()
        for label in labels.unique().tolist():
            values = x[labels == label]
            low, high = float(values.min()), float(values.max())
            ends = (low, high)
            if label in self.last:
                least, most = (margin * end for end in self.last[label])
                if spec.symmetric:
                    fits = max(-low, high) <= max(-least, most)
                else:
                    fits = min(low, 0.0) >= min(least, 0.0) and max(high, 0.0) <= max(most, 0.0)
                ends = (least, most) if fits else ends
            self.last[label] = (low, high)
            result[labels == label] = quantize_set(values, spec, spec.clip, torch.tensor(ends, dtype=x.dtype))
        return result

    def q(self, x: Tensor, clip: float | None = None, residual: bool = False) -> Tensor:
        """``Q(x)`` of an input or difference."""
        assert self.activation is not None
        labels = activation_labels(x.shape, self.activation, self.with_bias)
        clip = self.activation.clip if clip is None else clip
        if self.activation.scales == "power_of_two":
            by_sample = replace(self.activation, granularity="sample", scales="real")
            samples = activation_labels(x.shape, by_sample, self.with_bias)
            return quantize_by_exponents(x, labels, samples, self.activation, clip)
        return quantize(x, labels, self.activation, clip, residual and frees_zero(self.activation))


def quantize(x: Tensor, labels: Tensor, spec: QuantSpec, clip: float, free: bool = False) -> Tensor:
    """``Q(x)``: each set of elements with the same label is quantized by itself (equations 4 and 5)."""
    result = torch.empty_like(x)
    for label in labels.unique():
        members = labels == label
        result[members] = quantize_freely(x[members], spec, clip) if free else quantize_set(x[members], spec, clip)
    return result


def quantize_by_exponents(x: Tensor, labels: Tensor, samples: Tensor, spec: QuantSpec, clip: float) -> Tensor:
    """``Q(x)`` with scales that are powers of two times one scale per sample, as METHOD.md defines them.

    Each set (a sample and channel) has the scale of its own range; s is the largest of the sample's sets, and the set's
    final scale is s times 2 to the power -e, with e the whole part of log2(s / own), at least 0 and at most E.

    Args:
        x: Input or difference.
        labels: Number of the set of each element.
        samples: Number of the sample of each element.
        spec: The quantizer.
        clip: Share of the range.
    """
    most = (8 if spec.symmetric else 7) - spec.bits
    own = {int(label): own_scale(x[labels == label], spec, clip) for label in labels.unique()}
    result = torch.empty_like(x)
    for sample in samples.unique():
        members = labels[samples == sample].unique().tolist()
        shared = max(own[label] for label in members)
        for label in members:
            e = most if own[label] == 0 else min(max(math.floor(math.log2(shared / own[label])), 0), most)
            scale = (shared or 1.0) * 2.0**-e
            values = x[labels == label]
            low = clip * min(float(values.min()), 0.0)
            zero_point = 0.0 if spec.symmetric else min(max(round(-low / scale), 0), 2**spec.bits - 1)
            result[labels == label] = quantize_with(values, scale, zero_point, spec)
    return result


def own_scale(x: Tensor, spec: QuantSpec, clip: float) -> float:
    """The scale of the range of elements ``[N]``; 0 where all of them are 0."""
    if spec.symmetric:
        return clip * float(x.abs().max()) / (2 ** (spec.bits - 1) - 1)
    return clip * (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / (2**spec.bits - 1)


def quantize_set(x: Tensor, spec: QuantSpec, clip: float, ends: Tensor | None = None) -> Tensor:
    """``Q(x)`` of elements ``[N]`` that share a scale, which comes from their range, or from that of ``ends``."""
    ends = x if ends is None else ends
    if spec.symmetric:
        n = 2 ** (spec.bits - 1) - 1
        scale = _nonzero(clip * ends.abs().max() / n)
        return torch.clamp(torch.round(x / scale), -n, n) * scale
    top = 2**spec.bits - 1
    low, high = clip * min(float(ends.min()), 0.0), clip * max(float(ends.max()), 0.0)
    scale = _nonzero(torch.tensor((high - low) / top, dtype=x.dtype))
    zero_point = torch.clamp(torch.round(-low / scale), 0, top)
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, top)  # (4)
    return scale * (codes - zero_point)  # (5)


def quantize_freely(x: Tensor, spec: QuantSpec, clip: float) -> Tensor:
    """``Q(x)`` of elements ``[N]`` that share a scale, whose range need not contain 0."""
    top = 2**spec.bits - 1
    low, high = float(x.min()), float(x.max())
    nearest = min(max(0.0, low), high)
    low, high = nearest + clip * (low - nearest), nearest + clip * (high - nearest)
    scale = _nonzero(torch.tensor(max((high - low) / top, max(-low, high) / 2**15), dtype=x.dtype))
    zero_point = torch.round(-low / scale)
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, top)  # (4)
    return scale * (codes - zero_point)  # (5)


def quantize_with(x: Tensor, scale: float, zero_point: float, spec: QuantSpec) -> Tensor:
    """``Q(x)`` of elements ``[N]`` with a scale and zero point that are known."""
    n = 2 ** (spec.bits - 1) - 1
    lowest, highest = (-n, n) if spec.symmetric else (0, 2**spec.bits - 1)
    codes = torch.clamp(torch.round(x / scale) + zero_point, lowest, highest)  # (4)
    return scale * (codes - zero_point)  # (5)


def activation_labels(shape: torch.Size, spec: QuantSpec, operator: Any) -> Tensor:
    """For each element of an input, the number of the set that it shares a scale with; int64 in the input's shape."""
    index = torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij")
    if isinstance(operator, nn.Linear):
        batched, channel = len(shape) > 1, index[-1]
    else:
        batched = len(shape) == operator.weight.ndim
        channel = index[1] if batched else index[0]
    sample = index[0] if batched else torch.zeros_like(channel)
    same = torch.zeros_like(channel)
    keys = {
        "tensor": (same,),
        "sample": (sample,),
        "channel": (channel,),
        "sample_channel": (sample, channel),
        "token": (same, *index[:-1]),
        "group": (channel // (spec.group_size or 1),),
    }
    return _number(keys[spec.granularity])


def weight_labels(shape: torch.Size, spec: QuantSpec) -> Tensor:
    """The same for a weight ``[out, in / groups, *kernel]``."""
    index = torch.meshgrid(*[torch.arange(size) for size in shape], indexing="ij")
    keys = {
        "tensor": (torch.zeros_like(index[0]),),
        "channel": (index[0],),
        "group": (index[0], index[1] // (spec.group_size or 1)),
    }
    return _number(keys[spec.granularity])


def _number(keys: tuple[Tensor, ...]) -> Tensor:
    """One number for each different combination of keys."""
    number = torch.zeros_like(keys[0])
    for key in keys:
        number = number * (int(key.max()) + 1) + key
    return number


def _nonzero(scale: Tensor) -> Tensor:
    """A set of zeros has scale 1."""
    return scale if float(scale) > 0 else torch.ones_like(scale)
