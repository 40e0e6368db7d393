"""BRECQ: the rounding of all operators of a block, learned together from the block's output (Li et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights.adaround import AdaRound
from modiff.calibration.weights.learned_rounding import Grids, learn_rounding
from modiff.calibration.weights.methods import WeightProblem, register
from modiff.quantizers.rounding import QuantizedWeight


@register("brecq")
class Brecq(AdaRound):
    """Learn the rounding of a block's operators together; operators outside of blocks are left to AdaRound."""

    by_block = True

    def solve_block(
        self,
        block: nn.Module,
        problems: Mapping[str, WeightProblem],
        store: SampleStore,
        arguments: CallArguments,
        settings: CalibrationSettings,
        generator: torch.Generator,
    ) -> dict[str, QuantizedWeight]:
        """Quantize the weights of a block from samples of its inputs and targets."""
        grids = {name: (problem.weight, problem.nearest(), problem.spec) for name, problem in problems.items()}
        return reconstruct(block, grids, store, arguments, settings, generator)


def reconstruct(
    block: nn.Module,
    grids: Grids,
    store: SampleStore,
    arguments: CallArguments,
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
        arguments: How the inputs make up the block's arguments.
        settings: Steps, batch size, learning rate, penalty.
        generator: Draws the batches, on the CPU.

    Returns:
        Learned weights by name, or those of ``grids`` where these give the smaller error over all samples.
    """
    device = next(block.parameters()).device

    def error(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        tensors = {key: t.to(device) for key, t in store.rows(rows).items()}
        args, kwargs = arguments.build(tensors)
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
    learned = learn_rounding(grids, lambda values: error(values, next(batches)) / unit, settings)
    return learned if total(learned) < unit else nearest


def _in_order(count: int, size: int) -> Iterator[Tensor]:
    yield from torch.arange(count).split(size)


def _shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count, generator=generator).split(size)
