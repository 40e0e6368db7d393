"""Learned rounding: AdaRound for single operators, BRECQ's reconstruction for blocks of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modiff.calibration.loop.moments import Moments
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.structure import Structure
from modiff.calibration.settings import CalibrationSettings
from modiff.config.quant import QuantSpec
from modiff.quantizers.rounding import QuantizedWeight, SoftRounding, rectified_sigmoid, rounding_penalty

Grids = dict[str, tuple[Tensor, QuantizedWeight, QuantSpec]]
"""By operator: its weight, that weight rounded to nearest, the quantizer."""


def adaround(
    weight: Tensor, moments: Moments, grid: QuantizedWeight, spec: QuantSpec, settings: CalibrationSettings
) -> QuantizedWeight:
    """Choose for each code of an operator between its two neighbours (Nagel et al. 2020, equation 25).

    The error is asymmetric: the student's inputs with the rounded weight, against the teacher's outputs from its own
    inputs. From the moments it is exact over all recorded vectors, so every step is a full-batch one.

    Args:
        weight: ``[out, in / groups, *kernel]``.
        moments: Of the operator's inputs and targets.
        grid: The weight rounded to nearest: its scales and zero points are kept.
        spec: The quantizer.
        settings: Steps, learning rate, penalty, damping.

    Returns:
        The learned codes, or those of ``grid`` where these have the smaller error.
    """
    hessian = moments.damped(settings.damping)
    shape = moments.cross.shape
    flat = weight.detach().float().reshape(shape)
    # ||W~ x - y||^2 about W: what is left of the targets is small, where ||y||^2 would swallow its digits.
    residual = moments.cross - flat @ moments.hessian

    def error(values: Tensor) -> Tensor:
        d = values.float().reshape(shape) - flat
        return ((d @ hessian) * d).sum() - 2 * (d * residual).sum()

    d = grid.dequantize().float().reshape(shape) - flat
    unit = ((d @ hessian) * d).sum()
    if unit <= 0:  # rounding to nearest is exact, or its inputs are all zero
        return grid

    def slope(values: Tensor) -> Tensor:
        # Linear in the values with the gradient of the error: one product with the Hessian a step, not three.
        with torch.no_grad():
            gradient = (values.float().reshape(shape) - flat) @ hessian - residual
        return 2 * (values.float().reshape(shape) * gradient).sum()

    learned = _learn({"": (weight, grid, spec)}, lambda values: slope(values[""]) / unit, settings)[""]
    return learned if error(learned.dequantize()) < error(grid.dequantize()) else grid


def reconstruct(
    block: nn.Module,
    grids: Grids,
    store: SampleStore,
    structure: Structure,
    settings: CalibrationSettings,
    generator: torch.Generator,
) -> dict[str, QuantizedWeight]:
    """Learn the rounding of all operators of a block together, from the block's output (BRECQ, Li et al. 2021).

    Inputs are the student's, with all errors from before the block; targets are the teacher's. Activations inside the
    block stay in full precision while its weights are learned, as in Q-Diffusion.

    Args:
        block: The teacher's module; left as it is.
        grids: Its operators by name relative to the block.
        store: Recorded inputs and targets.
        structure: How the inputs make up the block's arguments.
        settings: Steps, batch size, learning rate, penalty.
        generator: Draws the batches, on the CPU.

    Returns:
        Learned weights by name, or those of ``grids`` where these give the smaller error over all samples.
    """
    device = next(block.parameters()).device

    def error(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        tensors = {key: t.to(device) for key, t in store.rows(rows).items()}
        args, kwargs = structure.build(tensors)
        dtypes = {name: weight.dtype for name, (weight, _, _) in grids.items()}
        parameters = {f"{name}.weight": value.to(dtypes[name]) for name, value in values.items()}
        output = functional_call(block, parameters, args, kwargs)
        return (output.float() - tensors["target"].float()).square().mean()

    def total(weights: dict[str, QuantizedWeight]) -> float:
        values = {name: weight.dequantize() for name, weight in weights.items()}
        with torch.no_grad():
            sums = [error(values, rows).item() * len(rows) for rows in _in_order(len(store), settings.batch_size)]
        return math.fsum(sums) / len(store)

    nearest = {name: grid for name, (_, grid, _) in grids.items()}
    unit = total(nearest)
    if unit <= 0:
        return nearest
    batches = _shuffled(len(store), settings.batch_size, generator)
    learned = _learn(grids, lambda values: error(values, next(batches)) / unit, settings)
    return learned if total(learned) < unit else nearest


def penalty_beta(step: int, settings: CalibrationSettings) -> float | None:
    """β of the rounding penalty at a step: None in the warm-up, then annealed by a cosine."""
    start = settings.warmup * settings.iterations
    if step < start:
        return None
    first, last = settings.beta
    done = (step - start) / max(settings.iterations - 1 - start, 1)
    return last + 0.5 * (first - last) * (1 + math.cos(min(done, 1.0) * math.pi))


def _learn(
    grids: Grids, loss: Callable[[dict[str, Tensor]], Tensor], settings: CalibrationSettings
) -> dict[str, QuantizedWeight]:
    """Minimize ``loss`` of the soft weights (only its gradient counts) plus the penalty; return hard weights."""
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


def _in_order(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)


def _shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
