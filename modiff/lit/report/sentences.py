"""What the numbers of a run say: the largest errors, and one plain sentence for each finding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from modiff.errors import ConfigError
from modiff.lit.report.result import Result
from modiff.lit.report.tables import Rows
from modiff.lit.report.words import number, percent, share

LIKENESS = (
    (40.0, "hard to tell from the teacher's"),
    (30.0, "close to the teacher's, with small differences"),
    (20.0, "recognizably the teacher's, with visible differences"),
    (float("-inf"), "far from the teacher's"),
)


def error_matrix(errors: Mapping[str, Any]) -> np.ndarray:
    """Operators' errors ``[operators, evaluations]`` in float64, NaN where nothing finite was recorded.

    Raises:
        ConfigError: The lists of ``errors`` do not belong together.
    """
    steps, names = len(errors["timesteps"]), errors["operators"]
    table = errors["operator_error"]
    if len(table) != len(names) or any(len(row) != steps for row in table) or len(errors["sample_error"]) != steps:
        raise ConfigError(
            f"errors holds {steps} timesteps, {len(names)} operators, {len(errors['sample_error'])} sample errors and "
            f"{len(table)} rows of operator errors; one row per operator and one value per timestep are needed."
        )
    matrix = np.array([[finite(v) for v in row] for row in table], dtype=np.float64)
    return matrix.reshape(len(names), steps)


def worst_operators(errors: Mapping[str, Any], count: int) -> list[tuple[str, float]]:
    """The ``count`` operators with the largest error, mean over the evaluations that recorded one; largest first."""
    means = [(name, mean(row)) for name, row in zip(errors["operators"], error_matrix(errors), strict=True)]
    ranked = sorted((pair for pair in means if pair[1] > 0), key=lambda pair: -pair[1])
    return ranked[:count]


def finite(value: float | None) -> float:
    """The value, NaN where it is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def mean(values: np.ndarray) -> float:
    """Mean of what was recorded, NaN where nothing was."""
    recorded = values[~np.isnan(values)]
    return float(recorded.mean()) if recorded.size else math.nan


def headline(result: Result) -> str:
    """What the numbers mean, in one plain sentence."""
    evaluations, cost = result.evaluations, result.cost
    assert evaluations is not None
    assert cost is not None
    psnr, l2 = result.value("student.psnr_db"), result.value("student.relative_l2")
    if psnr is not None:
        likeness = next(text for limit, text in LIKENESS if psnr >= limit or limit == LIKENESS[-1][0])
        finding = f"The student's images are {likeness} (PSNR {number(psnr)} dB)"
    elif l2 == 0:
        finding = "The student's images are identical to the teacher's"
    else:
        finding = f"The student's images differ from the teacher's by {percent(l2)} (relative L2)"
    quantized, total = evaluations["quantized"], evaluations["total"]
    before, after = cost["teacher_gbops_per_evaluation"], cost["gbops_per_evaluation"]
    if quantized == 0:
        how = f"none of the {total} denoiser evaluations quantized its activations"
    elif quantized == total:
        how = f"all {total} denoiser evaluations ran on quantized activations"
    else:
        how = f"{quantized} of {total} denoiser evaluations ran on quantized activations"
    return f"{finding}; {how}, and an evaluation takes {share(after, before)} the teacher's bit operations."


def describe_errors(errors: Mapping[str, Any]) -> list[str]:
    """Say in words how the error grows, in which operators and at which timesteps it is largest."""
    matrix, steps = error_matrix(errors), list(errors["timesteps"])
    worst = worst_operators(errors, 5)
    if not steps:
        return ["No evaluation was recorded."]
    first, last, texts = errors["sample_error"][0], errors["sample_error"][-1], []
    peak = int(np.argmax(np.nan_to_num(np.array(errors["sample_error"], dtype=np.float64), nan=-1.0)))
    texts.append(
        f"x_t is {percent(first)} away from the teacher's at the first evaluation (t = {steps[0]}) and "
        f"{percent(last)} at the last (t = {steps[-1]}); it is furthest away at t = {steps[peak]} "
        f"({percent(errors['sample_error'][peak])})."
    )
    if not worst:
        return [*texts, "No operator's output differed from the teacher's."]
    names = ", ".join(f"{name} ({percent(value)})" for name, value in worst)
    texts.append(f"Operators with the largest error, mean over the evaluations: {names}.")
    medians = [(float(np.median(c[~np.isnan(c)])), t) for c, t in zip(matrix.T, steps, strict=True) if np.any(c > 0)]
    ranked = sorted(medians, key=lambda pair: -pair[0])[:3]
    hardest = ", ".join(f"t = {t} ({percent(value)})" for value, t in ranked)
    return [*texts, f"Evaluations with the largest error, median over the operators: {hardest}."]


def closest(rows: Rows) -> str:
    """Name the recipes closest to and furthest from the teacher's images, in one sentence."""
    found = [(result.value("student.psnr_db"), name) for name, result in rows]
    known = [(psnr, name) for psnr, name in found if psnr is not None]
    if not known:
        return "No recipe has a PSNR to compare by; the notes below the table say why."
    (high, best), (low, last) = max(known), min(known)
    if len(known) == 1 or high == low:
        return f"{best} reaches a PSNR of {number(high)} dB to the teacher's images."
    return (
        f"Closest to the teacher's images is {best} (PSNR {number(high)} dB), furthest away {last} ({number(low)} dB)"
        + ("; recipes without a PSNR are left out." if len(known) < len(rows) else ".")
    )
