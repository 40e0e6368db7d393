"""Rounding to nearest, on scales of the whole range."""

from __future__ import annotations

from modiff.calibration.weights.methods import WeightMethod, register


@register("nearest")
class Nearest(WeightMethod):
    """Round each number to the nearest code, as :func:`modiff.quantize` does."""

    plain = True
