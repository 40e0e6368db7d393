"""The errors along trajectories, as the charts and tables of a page take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from modiff.lit.report.rendering import Heading, TableView
from modiff.lit.report.result import TrajectoryErrorTable
from modiff.lit.report.sentences import describe_errors, error_matrix, mean
from modiff.lit.report.tables import Cell
from modiff.lit.report.words import number


def error_view(found: Mapping[str, TrajectoryErrorTable]) -> dict[str, Any]:
    """What a page shows of the errors of one recipe, or of several side by side.

    Args:
        found: Errors by recipe.

    Returns:
        ``sentences`` and ``table`` for the template, of the only recipe; ``data`` for the scripts: the curves of x_t,
        and of one recipe alone also the median and the worst operator and the whole matrix.

    Raises:
        ConfigError: The lists of a recipe's errors do not belong together.
    """
    matrices = {name: error_matrix(errors) for name, errors in found.items()}
    if len(found) > 1:
        curves = [_curve(name, errors["timesteps"], errors["sample_error"]) for name, errors in found.items()]
        return {"sentences": [], "table": None, "data": {"curves": curves, "matrix": None}}
    ((_, errors),), ((_, matrix),) = found.items(), matrices.items()
    steps = errors["timesteps"]
    columns = [column[~np.isnan(column)] for column in matrix.T]
    curves = [
        _curve("x_t", steps, errors["sample_error"]),
        _curve("median operator", steps, [float(np.median(c)) if c.size else None for c in columns]),
        _curve("worst operator", steps, [float(c.max()) if c.size else None for c in columns]),
    ]
    whole = {
        "timesteps": list(steps),
        "operators": list(errors["operators"]),
        "values": [[_short(v) for v in row] for row in matrix],
    }
    return {
        "sentences": describe_errors(errors),
        "table": _table(errors, matrix),
        "data": {"curves": curves, "matrix": whole},
    }


def _curve(name: str, steps: list[int], values: Any) -> dict[str, Any]:
    return {"name": name, "timesteps": list(steps), "values": [_short(value) for value in values]}


def _short(value: float | None) -> float | None:
    """Four significant digits: what a page can show; None for what is missing or not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def _table(errors: TrajectoryErrorTable, matrix: np.ndarray) -> TableView:
    """Operators by their error: mean, largest, and when."""
    rows = []
    for name, values in zip(errors["operators"], matrix, strict=True):
        recorded = ~np.isnan(values)
        if recorded.any():
            peak = int(np.nanargmax(values))
            when = errors["timesteps"][peak]
            rows.append(
                [Cell(name), _fraction(mean(values)), _fraction(float(values[peak])), Cell(str(when), float(when))]
            )
    titles = ("mean error, %", "largest error, %", "at timestep")
    headings = [Heading("operator"), *(Heading(title, numeric=True) for title in titles)]
    rows.sort(key=lambda row: -(row[1].value or 0.0))
    return TableView("Error of each operator's output, relative L2", headings, rows, tall=True)


def _fraction(value: float) -> Cell:
    return Cell(number(100 * value, 3), 100 * value)
