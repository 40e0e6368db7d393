"""The one front of calibration: teacher, configuration and sampling loop in; student out."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modiff.calibration.job import Progress, StageFolder
from modiff.calibration.loop.capture import ClosedLoop, Run
from modiff.calibration.loop.moments import Moments, no_data
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.structure import Structure, shared_copy
from modiff.calibration.loop.tracing import Trace, fingerprint
from modiff.calibration.planning import Stage, plan_stages
from modiff.calibration.prepare.inputs import find_divisors, find_splits
from modiff.calibration.ranges.observe import RangeCalibration, with_dynamic_ranges
from modiff.calibration.settings import DATA_METHODS, METHODS, CalibrationSettings
from modiff.calibration.weights.adaround import adaround, reconstruct
from modiff.calibration.weights.gptq import gptq
from modiff.calibration.weights.tuning import record_outputs, tune
from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import ConfigError
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.rewrites import rewrite
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import QuantizedWeight, round_lp, round_nearest
from modiff.student.special import resolve
from modiff.student.swap import convert, operators, plan
from modiff.student.tensors import slots


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
    with the weights found so far, and those rounded to nearest for the rest. Ranges of activations that are to be
    calibrated are dynamic until all weights are found; then they are found in passes of their own. The same arguments
    give the same bits on one machine with the same number of threads.

    Args:
        teacher: A denoiser; as for :func:`modiff.quantize`.
        config: What to quantize, and how.
        run: ``run(student)`` opens ``modiff.trajectory(student)`` and samples in it, once for each batch. It is called
            for every stage and must do the same each time. Needed by the methods that use data, and by calibrated
            ranges, which are for trajectories as long as these.
        method: ``nearest``; ``lp``: scales of least Lp error; ``gptq``; ``adaround``: layer by layer; ``brecq``: block
            by block, single operators where there is no block. The last three round on the scales of ``nearest``
            (clipped ranges, which lose less in the norm of a weight or an output, shrink outputs, and that adds up over
            steps), then tune scales and biases on the denoiser's output (:func:`.tuning.tune`).
        seed: Draws what is recorded, and batches.
        settings: Data, memory, steps.
        progress: Called with ``(stages done, stages in all, what the last one was)``.
        folder: Keeps each finished stage there, and continues from what it finds; also the place of samples that do not
            fit in memory. None: nothing is kept.
        keep_teacher: As for :func:`modiff.quantize`.
        reducer: The processes that share the work, each with a run of its own trajectories, dealt in turn; every one
            ends with the same bits. What is recorded does not depend on their number, sums of it do by their rounding.
            ``folder`` is the first one's. None: this process alone.

    Returns:
        The teacher, now the student, ready for :func:`modiff.save`. After an error it is unchanged.

    Raises:
        CalibrationError: The run misses an operator, activations are NaN or Inf, memory or disk do not suffice, there
            are more buckets of time steps than steps, or the folder holds the calibration of another model, run or
            setting.
        ConfigError: As for :func:`modiff.quantize`; the method is unknown, or needs a run and has none.
    """
    settings = settings or CalibrationSettings()
    _check_arguments(method, seed)
    config = resolve(teacher, config)
    config, divisors = _prepare(teacher, config, run, settings, reducer)
    reference = shared_copy(teacher)
    rewrite(reference, config, divisors)
    specs = calibrated_specs(reference, config)
    if method == "nearest" and not specs:
        return convert(teacher, config, keep_teacher, divisors=divisors)
    student = convert(shared_copy(teacher), with_dynamic_ranges(config), keep_teacher=True, divisors=divisors)
    weights = _lp_weights(student, settings.norm) if method == "lp" else {}
    for name, packed in weights.items():
        operators(student)[name].use(packed)
    grids = _grids(student) if method in DATA_METHODS else {}
    ranges: dict[str, CalibratedRange] = {}
    if grids or specs:
        if run is None:
            what = f"method {method!r}" if grids else "range 'calibrated'"
            raise ConfigError(f"{what} needs data. Give run, a function that samples with the student.")
        loop = ClosedLoop(student, reference, run, reducer)
        job = _Job(student, loop, grids, specs, method, seed, settings)
        key = _identity(teacher, config, method, seed, settings)
        found, ranges = job.solve(key, None if folder is None else Path(folder), progress)
        weights |= found
    return convert(teacher, config, keep_teacher, weights or None, ranges, divisors)


def _identity(
    teacher: nn.Module, config: QuantConfig, method: str, seed: int, settings: CalibrationSettings
) -> dict[str, Any]:
    """What a kept stage must have been found for."""
    return {
        "teacher": fingerprint({slot.name: slot.tensor for slot in slots(teacher)}),
        "method": method,
        "seed": seed,
        "config": dataclasses.asdict(config),
        "settings": dataclasses.asdict(settings),
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


def _check_arguments(method: str, seed: int) -> None:
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; allowed are {', '.join(METHODS)}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed is {seed!r}; give a whole number of at least 0.")


class _Job:
    """The stages of one calibration."""

    def __init__(
        self,
        student: nn.Module,
        loop: ClosedLoop,
        grids: Mapping[str, QuantizedWeight],
        specs: Mapping[str, QuantSpec],
        method: str,
        seed: int,
        settings: CalibrationSettings,
    ) -> None:
        self.student = student
        self.loop = loop
        self.grids = grids
        self.specs = specs
        self.method = method
        self.seed = seed
        self.settings = settings
        self.reducer = loop.reducer

    def solve(
        self, key: dict[str, Any], folder: Path | None, progress: Progress | None
    ) -> tuple[dict[str, PackedWeight], dict[str, CalibratedRange]]:
        """Quantized weights, then calibrated ranges, of all stages; those that lie in ``folder`` are read."""
        trace = self.loop.trace()
        stages = plan_stages(
            self.loop.teacher, operators(self.student), list(self.grids), trace, self.method, self.settings
        )
        tunes = bool(stages) and self.settings.tuning_iterations > 0
        done = len(stages) + tunes
        total = done + (self.settings.range_passes if self.specs else 0)
        ranges = RangeCalibration(self.loop, self.specs, trace, self.settings)
        once = self.reducer.once
        kept = None if folder is None else StageFolder(folder, {**key, "run": trace.digest})
        weights: dict[str, PackedWeight] = {}
        for index, stage in enumerate(stages):
            specs = {name: _spec(operators(self.student)[name]) for name in stage.operators}
            found = None if kept is None else once(partial(kept.read, index, specs))
            if found is None:
                with _scratch(folder, self.reducer.rank) as scratch:
                    found = self._solve_stage(index, stage, trace, scratch)
                if kept is not None:
                    once(partial(kept.write, index, found))
            for name, packed in found.items():
                operator = operators(self.student)[name]
                weights[name] = packed.to(operator.module.weight.device)
                operator.use(weights[name])
            if progress is not None:
                progress(index + 1, total, stage.block or ", ".join(stage.operators))
        if tunes:  # after the codes: it makes up for what they leave
            specs = {name: _spec(operators(self.student)[name]) for name in weights}
            tuned = None if kept is None else once(partial(kept.read, len(stages), specs))
            if tuned is None:
                tuned = self._tune(len(stages), weights, trace, folder)
                if kept is not None:
                    once(partial(kept.write, len(stages), tuned))
            for name, packed in tuned.items():
                weights[name] = packed.to(weights[name].codes.device)
                operators(self.student)[name].use(weights[name])
            if progress is not None:
                progress(done, total, "scales and biases")
        passed: dict[str, CalibratedRange] = {}
        for index in range(done, total):  # after the weights: residuals depend on them
            found_ranges = None if kept is None else once(partial(kept.read_ranges, index, list(self.specs)))
            if found_ranges is None:
                with _scratch(folder, self.reducer.rank) as scratch:
                    found_ranges = ranges.run_pass(scratch, self._generator(index), last=index == total - 1)
                if kept is not None:
                    once(partial(kept.write_ranges, index, found_ranges))
            passed = found_ranges
            ranges.use(passed)
            if progress is not None:
                progress(index + 1, total, f"ranges, pass {index - done + 1}")
        return weights, passed

    def _generator(self, index: int) -> torch.Generator:
        """One of its own for each stage: a calibration that goes on in the middle draws the same numbers."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + index)

    def _solve_stage(self, index: int, stage: Stage, trace: Trace, scratch: Path) -> dict[str, PackedWeight]:
        """Weights of a stage, on the CPU: data from all processes, each weight found by one of them."""
        generator, settings = self._generator(index), self.settings
        if stage.block is not None:
            with SampleStore(scratch, settings.memory, stage.block) as store:
                structure = self.loop.samples(
                    stage.block, trace, settings.evaluations, settings.samples, store, generator
                )
                return self.reducer.once(lambda: self._solve_block(stage, store, structure, generator))
        moments = self.loop.moments(stage.operators, trace, settings.evaluations, settings.positions, generator)
        mine = stage.operators[self.reducer.rank :: self.reducer.world_size]
        found = self.reducer.each(lambda: {name: self._solve_operator(name, moments.pop(name)) for name in mine})
        return {name: packed for part in self.reducer.gather(found) for name, packed in part.items()}

    def _solve_block(
        self, stage: Stage, store: SampleStore, structure: Structure, generator: torch.Generator
    ) -> dict[str, PackedWeight]:
        assert stage.block is not None
        prefix = f"{stage.block}."
        grids = {
            name.removeprefix(prefix): (self._weight(name), self.grids[name], self._spec(name))
            for name in stage.operators
        }
        block = self.loop.teacher.get_submodule(stage.block)
        found = reconstruct(block, grids, store, structure, self.settings, generator)
        return {prefix + name: self._packed(prefix + name, weight) for name, weight in found.items()}

    def _solve_operator(self, name: str, moments: Moments) -> PackedWeight:
        weight, grid, spec, settings = self._weight(name), self.grids[name], self._spec(name), self.settings
        if self.method == "gptq":
            return self._packed(name, gptq(weight, moments.hessian, grid, spec, settings.damping, name))
        return self._packed(name, adaround(weight, moments, grid, spec, settings))

    def _packed(self, name: str, weight: QuantizedWeight) -> PackedWeight:
        return PackedWeight.pack(weight, self._spec(name)).to(torch.device("cpu"))

    def _tune(
        self, index: int, weights: Mapping[str, PackedWeight], trace: Trace, folder: Path | None
    ) -> dict[str, PackedWeight]:
        generator, settings, cpu = self._generator(index), self.settings, torch.device("cpu")
        with (
            _scratch(folder, self.reducer.rank) as scratch,
            SampleStore(scratch, settings.memory, "the denoiser") as store,
        ):
            recorded = record_outputs(self.loop, trace, settings.evaluations, settings.samples, store, generator)

            def tuned() -> dict[str, PackedWeight]:
                found = tune(self.loop, weights, store, recorded, settings, generator)
                return {name: packed.to(cpu) for name, packed in found.items()}

            return self.reducer.once(tuned)

    def _weight(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = operators(self.student)[name].module.weight
        return weight.detach()

    def _spec(self, name: str) -> Any:
        return _spec(operators(self.student)[name])


def calibrated_specs(teacher: nn.Module, config: QuantConfig) -> dict[str, QuantSpec]:
    """Activation specs of the operators whose ranges are to be calibrated.

    Raises:
        ConfigError: As for :func:`modiff.quantize`.
    """
    rows = [row for row in plan(teacher, config) if row.skipped is None]
    return {row.name: row.activation for row in rows if row.activation and row.activation.range == "calibrated"}


def _grids(student: nn.Module) -> dict[str, QuantizedWeight]:
    """Weights rounded to nearest, of the operators whose weights are quantized."""
    return {
        name: round_nearest(operator.module.weight, operator.weight_spec)
        for name, operator in operators(student).items()
        if operator.weight_spec is not None
    }


def _lp_weights(student: nn.Module, norm: float) -> dict[str, PackedWeight]:
    return {
        name: PackedWeight.pack(round_lp(operator.module.weight, operator.weight_spec, norm), operator.weight_spec)
        for name, operator in operators(student).items()
        if operator.weight_spec is not None
    }


def _spec(operator: QuantizedOperator) -> Any:
    assert operator.weight_spec is not None
    return operator.weight_spec


@contextmanager
def _scratch(folder: Path | None, rank: int) -> Iterator[Path]:
    """A folder for samples that do not fit in memory, for each process its own."""
    if folder is not None:
        yield folder / (f"samples-{rank}" if rank else "samples")
        return
    with tempfile.TemporaryDirectory(prefix="modiff-") as made:
        yield Path(made) / "samples"
