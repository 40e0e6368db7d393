"""Rounding to nearest, on the scales whose errors have the least Lp norm."""

from __future__ import annotations

from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights.methods import WeightMethod, WeightProblem, register
from modiff.quantizers.rounding import QuantizedWeight, round_lp


@register("lp")
class Lp(WeightMethod):
    """Search the share of the range on which a weight loses least in the norm ``settings.norm``."""

    def round(self, problem: WeightProblem, settings: CalibrationSettings) -> QuantizedWeight:
        """Quantize a weight from itself alone."""
        return round_lp(problem.weight, problem.spec, settings.norm)
