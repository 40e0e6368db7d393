"""Calibration: teacher, configuration and sampling loop in; student out."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.calibration.job import Job, weight_problem
from modiff.calibration.loop.capture import ClosedLoop, Run
from modiff.calibration.loop.moments import no_data
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.prepare.smoothing import find_divisors
from modiff.calibration.prepare.splits import find_splits
from modiff.calibration.ranges.observe import with_dynamic_ranges
from modiff.calibration.resume import Progress
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights import WeightMethod, weight_method
from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import ConfigError
from modiff.operators.rewrites import rewrite
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.packing import PackedWeight
from modiff.storage.hashing import hash_tensors
from modiff.student.copies import shared_copy
from modiff.student.special import resolve
from modiff.student.swap import convert, operators, plan
from modiff.student.tensors import slots

ALGORITHM_VERSION = 2
"""Of what a calibration finds from the same arguments. Raise it with every change that may move a bit of a result: kept
calibrations and stages of other versions are not used any more."""


def calibrate(
    teacher: nn.Module,
    config: QuantConfig,
    run: Run | None = None,
    method: str = "gptq",
    seed: int = 0,
    *,
    settings: CalibrationSettings | None = None,
    progress: Progress | None = None,
    folder: str | os.PathLike[str] | None = None,
    keep_teacher: bool = True,
    reducer: Reducer | None = None,
) -> nn.Module:
    """Make a teacher the student whose weights, and ranges, are found from what its own trajectories show.

    Operators are taken in the order of their calls, in stages: data for one come from a closed-loop run of the student
    with the weights found so far, and those rounded to nearest for the rest. Calibrated ranges are dynamic until all
    weights are found, and are found in passes of their own. The same arguments give the same bits on one machine with
    the same number of threads, for any number of processes.

    Args:
        teacher: A denoiser; as for :func:`modiff.quantize`.
        config: What to quantize, and how.
        run: ``run(student)`` opens ``modiff.trajectory(student)`` and samples in it, once for each batch; it must do
            the same in every call. Needed by methods that use data, and by calibrated ranges, which are for
            trajectories as long as these.
        method: A name of :func:`modiff.calibration.weights.weight_methods`, such as ``gptq``.
        seed: Draws what is recorded, and batches.
        settings: Data, memory, steps.
        progress: Called with ``(stages done, stages in all, what the last one was)``.
        folder: Keeps finished stages, resumes from them, and takes samples that do not fit in memory.
        keep_teacher: As for :func:`modiff.quantize`.
        reducer: The processes that share the work, each with a run of its own trajectories, dealt in turn; ``folder``
            is the first one's.

    Returns:
        The teacher, now the student. After an error it is unchanged.

    Raises:
        CalibrationError: The run misses an operator, activations are NaN or Inf, memory, disk or time steps do not
            suffice, or the folder holds the calibration of another model, run or setting.
        ConfigError: As for :func:`modiff.quantize`; the method is unknown, or needs a run and has none.
    """
    settings, by = settings or CalibrationSettings(), weight_method(method)
    _check_seed(seed)
    config, divisors = _prepare(teacher, resolve(teacher, config), run, settings, reducer)
    reference = _rewritten_copy(teacher, config, divisors)
    specs = calibrated_specs(reference, config)
    if by.plain and not specs:
        return convert(teacher, config, keep_teacher, divisors=divisors)
    student = convert(shared_copy(teacher), with_dynamic_ranges(config), keep_teacher=True, divisors=divisors)
    weights = {} if by.plain or by.uses_data else _round(student, by, settings)
    names = _quantized_weights(student) if by.uses_data else []
    ranges: dict[str, CalibratedRange] = {}
    if names or specs:
        loop = ClosedLoop(student, reference, _required(run, method if names else None), reducer)
        job = Job(loop, names, specs, by, seed, settings, None if folder is None else Path(folder), progress)
        found, ranges = job.solve(_identity(teacher, config, method, seed, settings))
        weights |= found
    return convert(teacher, config, keep_teacher, weights or None, ranges, divisors)


def _rewritten_copy(teacher: nn.Module, config: QuantConfig, divisors: dict[str, torch.Tensor] | None) -> nn.Module:
    """Copy the teacher with the operators that its student will have."""
    copy = shared_copy(teacher)
    rewrite(copy, config, divisors)
    return copy


def _required(run: Run | None, method: str | None) -> Run:
    """Refuse to find a method's weights, or else ranges, without a run."""
    if run is None:
        what = f"method {method!r}" if method is not None else "range 'calibrated'"
        raise ConfigError(f"{what} needs data. Give run, a function that samples with the student.")
    return run


def _identity(
    teacher: nn.Module, config: QuantConfig, method: str, seed: int, settings: CalibrationSettings
) -> dict[str, Any]:
    """Collect everything that a kept stage depends on."""
    return {
        "teacher": hash_tensors({slot.name: slot.tensor for slot in slots(teacher)}),
        "method": method,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "settings": dataclasses.asdict(settings),
        "algorithm": ALGORITHM_VERSION,
    }


def _prepare(
    teacher: nn.Module, config: QuantConfig, run: Run | None, settings: CalibrationSettings, reducer: Reducer | None
) -> tuple[QuantConfig, dict[str, torch.Tensor] | None]:
    """Find splits, and the divisors of smoothed operators, where the settings ask for them."""
    if settings.smoothing is None and not settings.split_concatenations:
        if config.smoothed:
            raise ConfigError("The configuration names smoothed operators, but smoothing is None. Set smoothing=0.5.")
        return config, None
    if run is None:
        raise ConfigError("smoothing and split_concatenations need data. Give run, which samples with the student.")
    if settings.split_concatenations and not config.splits:
        config = dataclasses.replace(config, splits=find_splits(teacher, with_dynamic_ranges(config), run, reducer))
    if settings.smoothing is None:
        return config, None
    whole = dataclasses.replace(with_dynamic_ranges(config), splits=(), smoothed=())
    student = convert(shared_copy(teacher), whole, keep_teacher=True)
    divisors = find_divisors(ClosedLoop(student, shared_copy(teacher), run, reducer), settings.smoothing)
    names = config.smoothed or tuple(name for name in divisors if name not in {split.name for split in config.splits})
    lost = [name for name in names if name not in divisors]
    if lost:
        raise no_data(lost[0])
    return dataclasses.replace(config, smoothed=names), divisors


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; give a whole number of at least 0.")


def calibrated_specs(teacher: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """Return the activation specs of the operators whose ranges are to be calibrated.

    Raises:
        ConfigError: As for :func:`modiff.quantize`.
    """
    rows = [row for row in plan(teacher, config) if row.skipped is None]
    return {row.name: row.activation for row in rows if row.activation and row.activation.range == "calibrated"}


def _quantized_weights(student: nn.Module) -> list[str]:
    """Return the names of the operators whose weights are quantized."""
    return [name for name, operator in operators(student).items() if operator.weight_spec is not None]


def _round(student: nn.Module, method: WeightMethod, settings: CalibrationSettings) -> dict[str, PackedWeight]:
    """Quantize weights without data, and give them to the student."""
    weights = {}
    for name in _quantized_weights(student):
        operator = operators(student)[name]
        problem = weight_problem(name, operator)
        weights[name] = PackedWeight.pack(method.round(problem, settings), problem.spec)
        operator.use(weights[name])
    return weights
