"""AdaRound: the rounding of single operators, learned from moments (Nagel et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.calibration.loop.moments import Moments
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights.learned_rounding import learn_rounding
from modiff.calibration.weights.methods import WeightMethod, WeightProblem, register
from modiff.config.quant import QuantSpec
from modiff.quantizers.rounding import QuantizedWeight


@register("adaround")
class AdaRound(WeightMethod):
    """Learn the rounding of each operator from the teacher's outputs."""

    uses_data = True

    def solve(self, problem: WeightProblem, moments: Moments, settings: CalibrationSettings) -> QuantizedWeight:
        """Quantize a weight from the moments of the operator's inputs and targets."""
        return adaround(problem.weight, moments, problem.nearest(), problem.spec, settings)


def adaround(
    weight: Tensor, moments: Moments, grid: QuantizedWeight, spec: QuantSpec, settings: CalibrationSettings
) -> QuantizedWeight:
    """Choose for each code of an operator between its two neighbors (Nagel et al. 2020, equation 25).

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

    learned = learn_rounding({"": (weight, grid, spec)}, lambda values: slope(values[""]) / unit, settings)[""]
    return learned if error(learned.dequantize()) < error(grid.dequantize()) else grid
