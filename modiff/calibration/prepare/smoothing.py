"""Divisors of input channels, which move outliers into the weights (SmoothQuant, Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.tracing import removed
from modiff.operators.quantized import QuantizedOperator
from modiff.student.swap import operators

TINY = 1e-5
"""Smallest absolute value that a channel counts with, as in SmoothQuant's reference code."""


def find_divisors(loop: ClosedLoop, strength: float) -> dict[str, Tensor]:
    """Find divisors that move outliers of channels into weights: ``max|X|^α / max|W|^(1-α)`` (SmoothQuant, eq. 4).

    X is what each Linear's quantizer really gets in closed loop: residuals, where modulated.

    Args:
        loop: The student, all of it, before anything is rewritten.
        strength: α; 0 evens out the weights, 1 the inputs.

    Returns:
        Float32 ``[in]`` of each Linear of which weight and input are quantized; geometric mean 1.
    """
    chosen = {
        name: operator
        for name, operator in operators(loop.student).items()
        if operator.adapter.kind == "linear"
        and operator.weight_spec is not None
        and operator.activation_spec is not None
    }
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(operator: QuantizedOperator, args: tuple[Any, ...]) -> None:
            x = operator.quantizer_input(args[0])
            if x is not None:
                found = x.abs().reshape(-1, x.shape[-1]).amax(dim=0)
                largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return watch

    with removed([operator.register_forward_pre_hook(hook(name)) for name, operator in chosen.items()]):
        loop.drive(lambda *_: None, lambda *_: None)
    divisors = {}
    for name, x in _largest_of_all(largest, loop.reducer).items():
        w = chosen[name].module.weight.detach().float().abs().amax(dim=0).clamp_min(TINY)
        logs = strength * x.to(w).clamp_min(TINY).log() - (1 - strength) * w.log()
        divisors[name] = (logs - logs.mean()).exp()
    return divisors


def _largest_of_all(largest: dict[str, Tensor], reducer: Reducer) -> dict[str, Tensor]:
    """Take element-wise maxima over all processes, of which one may lack an operator."""
    if reducer.world_size == 1:
        return largest
    merged: dict[str, Tensor] = {}
    for part in reducer.gather({name: x.cpu() for name, x in largest.items()}):
        for name, x in part.items():
            merged[name] = torch.maximum(merged[name], x) if name in merged else x
    return merged
