"""Learned rounding: each code is chosen between its two neighbors by gradient steps (Nagel et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modiff.calibration.settings import CalibrationSettings
from modiff.config.quant import QuantSpec
from modiff.quantizers.rounding import QuantizedWeight, SoftRounding, rectified_sigmoid, rounding_penalty

Grids = dict[str, tuple[Tensor, QuantizedWeight, QuantSpec]]
"""By operator: its weight, that weight rounded to nearest, the quantizer."""


def penalty_beta(step: int, settings: CalibrationSettings) -> float | None:
    """Return β of the rounding penalty at a step: None in the warm-up, then annealed by a cosine."""
    start = settings.warmup * settings.iterations
    if step < start:
        return None
    first, last = settings.beta
    done = (step - start) / max(settings.iterations - 1 - start, 1)
    return last + 0.5 * (first - last) * (1 + math.cos(min(done, 1.0) * math.pi))


def learn_rounding(
    grids: Grids, loss: Callable[[dict[str, Tensor]], Tensor], settings: CalibrationSettings
) -> dict[str, QuantizedWeight]:
    """Minimize a loss of the soft weights plus the rounding penalty, and return the hard weights.

    Args:
        grids: The operators whose rounding is learned together.
        loss: Of the soft weights by operator; only its gradient counts.
        settings: Steps, learning rate, penalty.
    """
    soft, variables = {}, {}
    for name, (weight, grid, spec) in grids.items():
        soft[name], v = SoftRounding.of(weight, grid, spec)
        variables[name] = v.requires_grad_(True)
    count = sum(v.numel() for v in variables.values())
    optimizer = torch.optim.Adam(variables.values(), lr=settings.learning_rate)
    with torch.enable_grad():
        for step in range(settings.iterations):
            value = loss({name: soft[name].soft(v) for name, v in variables.items()})
            beta = penalty_beta(step, settings)
            if beta is not None:
                penalty = sum(rounding_penalty(rectified_sigmoid(v), beta) for v in variables.values())
                value = value + settings.regularization / count * penalty
            # Only V: the block's other parameters would collect gradients too.
            gradients = torch.autograd.grad(value, list(variables.values()))
            for v, gradient in zip(variables.values(), gradients, strict=True):
                v.grad = gradient
            optimizer.step()
    return {name: soft[name].hard(v.detach()) for name, v in variables.items()}
