"""One calibration: its stages in order, each found once and kept, so that an interrupted calibration is resumable."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modiff.calibration.guard import keep_the_better
from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.tracing import Trace
from modiff.calibration.ranges.observe import RangeCalibration
from modiff.calibration.resume import Progress, StageFolder
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.stages import Stage, plan_stages
from modiff.calibration.tuning import record_outputs, tune
from modiff.calibration.weights import WeightMethod
from modiff.calibration.weights.methods import WeightProblem
from modiff.config.quant import QuantSpec
from modiff.operators.quantized import QuantizedOperator
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import QuantizedWeight, round_nearest
from modiff.student.swap import operators

Weights = dict[str, PackedWeight]
CPU = torch.device("cpu")


def weight_problem(name: str, operator: QuantizedOperator) -> WeightProblem:
    """State the weight of an operator as a method gets it."""
    assert operator.weight_spec is not None
    weight: Tensor = operator.original_weight
    return WeightProblem(name, weight.detach(), operator.weight_spec)


@dataclass
class Job:
    """The stages of one calibration: codes, the tuning of scales and biases, passes of ranges.

    Args:
        loop: Student, teacher and run. The student starts with weights rounded to nearest and dynamic ranges; each
            stage gives it what was found.
        names: Operators whose weights are found from data.
        specs: Specs of the activations whose ranges are found, by operator.
        method: Finds the weights.
        seed: Draws what is recorded, and batches.
        settings: Data, memory, steps.
        folder: Keeps finished stages; None: nothing is kept.
        progress: Called after each stage.
    """

    loop: ClosedLoop
    names: list[str]
    specs: Mapping[str, QuantSpec]
    method: WeightMethod
    seed: int
    settings: CalibrationSettings
    folder: Path | None = None
    progress: Progress | None = None
    _kept: StageFolder | None = field(default=None, init=False)
    _total: int = field(default=0, init=False)

    def solve(self, key: dict[str, Any]) -> tuple[Weights, dict[str, CalibratedRange]]:
        """Find weights, then ranges; finished stages that lie in the folder are read.

        Args:
            key: What the calibration depends on, besides its run.
        """
        trace = self.loop.trace()
        found = operators(self.loop.student)
        stages = plan_stages(self.loop.teacher, found, self.names, trace, self.method, self.settings)
        tunes = bool(stages) and self.settings.tuning_iterations > 0
        self._total = len(stages) + tunes + (self.settings.range_passes if self.specs else 0)
        self._kept = None if self.folder is None else StageFolder(self.folder, {**key, "run": trace.digest})
        ranges = RangeCalibration(self.loop, self.specs, trace, self.settings)
        weights: Weights = {}
        for index, stage in enumerate(stages):
            weights |= self._codes(index, stage, trace)
        if tunes:  # after the codes: it makes up for what they leave
            weights = self._tuned(len(stages), weights, trace)
        if weights and self.settings.compare_with_nearest:
            weights = keep_the_better(self.loop, weights, {name: self._nearest(name) for name in weights})
        passed: dict[str, CalibratedRange] = {}
        for index in range(len(stages) + tunes, self._total):  # after the weights: residuals depend on them
            passed = self._ranges(index, ranges, index - len(stages) - tunes + 1)
        return weights, passed

    def _codes(self, index: int, stage: Stage, trace: Trace) -> Weights:
        """Find or read the quantized weights of a stage, and give them to the student."""
        specs = {name: self._problem(name).spec for name in stage.operators}
        found = self._read(lambda kept: kept.read(index, specs))
        if found is None:
            with _scratch(self.folder, self.loop.reducer.rank) as scratch:
                found = self._solve_stage(index, stage, trace, scratch)
            self._keep(lambda kept: kept.write(index, found))
        self._tell(index, stage.block or ", ".join(stage.operators))
        return self._use(found)

    def _tuned(self, index: int, weights: Weights, trace: Trace) -> Weights:
        """Tune scales and biases, or read tuned weights, and give them to the student."""
        specs = {name: self._problem(name).spec for name in weights}
        found = self._read(lambda kept: kept.read(index, specs))
        if found is None:
            found = self._tune(index, weights, trace)
            self._keep(lambda kept: kept.write(index, found))
        self._tell(index, "scales and biases")
        return self._use(found)

    def _ranges(self, index: int, ranges: RangeCalibration, which: int) -> dict[str, CalibratedRange]:
        """Find or read the ranges of a pass, and give them to the student."""
        found = self._read(lambda kept: kept.read_ranges(index, list(self.specs)))
        if found is None:
            with _scratch(self.folder, self.loop.reducer.rank) as scratch:
                found = ranges.run_pass(scratch, self._generator(index), last=index == self._total - 1)
            self._keep(lambda kept: kept.write_ranges(index, found))
        ranges.use(found)
        self._tell(index, f"ranges, pass {which}")
        return found

    def _read(self, read: Callable[[StageFolder], Any]) -> Any:
        """Return what the first process reads of a finished stage; None where there is none."""
        kept = self._kept
        return None if kept is None else self.loop.reducer.once(lambda: read(kept))

    def _keep(self, write: Callable[[StageFolder], None]) -> None:
        kept = self._kept
        if kept is not None:
            self.loop.reducer.once(lambda: write(kept))

    def _use(self, found: Weights) -> Weights:
        used = {}
        for name, packed in found.items():
            operator = operators(self.loop.student)[name]
            used[name] = packed.to(operator.module.weight.device)
            operator.use(used[name])
        return used

    def _tell(self, index: int, what: str) -> None:
        if self.progress is not None:
            self.progress(index + 1, self._total, what)

    def _generator(self, index: int) -> torch.Generator:
        """Make a generator for each stage, so that a resumed calibration draws the same numbers."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + index)

    def _solve_stage(self, index: int, stage: Stage, trace: Trace, scratch: Path) -> Weights:
        """Find the weights of a stage, on the CPU: all processes give data, and one of them finds each weight."""
        generator, settings, reducer = self._generator(index), self.settings, self.loop.reducer
        if stage.block is not None:
            with SampleStore(scratch, settings.memory, stage.block) as store:
                arguments = self.loop.samples(
                    stage.block, trace, settings.evaluations, settings.samples, store, generator
                )
                return reducer.once(lambda: self._solve_block(stage, store, arguments, generator))
        moments = self.loop.moments(
            stage.operators, trace, settings.evaluations, settings.positions, generator, scratch, settings.memory
        )

        def solve(name: str) -> PackedWeight:
            problem = self._problem(name)
            return _packed(problem, self.method.solve(problem, moments.pop(name), settings))

        found = reducer.each(lambda: {name: solve(name) for name in list(moments)})
        parts = {name: packed for part in reducer.gather(found) for name, packed in part.items()}
        return {name: parts[name] for name in stage.operators}

    def _solve_block(
        self, stage: Stage, store: SampleStore, arguments: CallArguments, generator: torch.Generator
    ) -> Weights:
        assert stage.block is not None
        prefix = f"{stage.block}."
        problems = {name.removeprefix(prefix): self._problem(name) for name in stage.operators}
        block = self.loop.teacher.get_submodule(stage.block)
        found = self.method.solve_block(block, problems, store, arguments, self.settings, generator)
        return {prefix + name: _packed(problems[name], weight) for name, weight in found.items()}

    def _tune(self, index: int, weights: Weights, trace: Trace) -> Weights:
        generator, settings, reducer = self._generator(index), self.settings, self.loop.reducer
        with (
            _scratch(self.folder, reducer.rank) as scratch,
            SampleStore(scratch, settings.memory, "the denoiser") as store,
        ):
            recorded = record_outputs(self.loop, trace, settings.evaluations, settings.samples, store, generator)

            def tuned() -> Weights:
                found = tune(self.loop, weights, store, recorded, settings, generator)
                return {name: packed.to(CPU) for name, packed in found.items()}

            return reducer.once(tuned)

    def _nearest(self, name: str) -> PackedWeight:
        """The weight rounded to nearest, which the student began with, where its operator is."""
        problem = self._problem(name)
        return PackedWeight.pack(round_nearest(problem.weight, problem.spec), problem.spec)

    def _problem(self, name: str) -> WeightProblem:
        return weight_problem(name, operators(self.loop.student)[name])


def _packed(problem: WeightProblem, weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight.pack(weight, problem.spec).to(CPU)


@contextmanager
def _scratch(folder: Path | None, rank: int) -> Iterator[Path]:
    """Provide a folder for samples that do not fit in memory; each process has its own."""
    if folder is not None:
        yield folder / (f"samples-{rank}" if rank else "samples")
        return
    with tempfile.TemporaryDirectory(prefix="modiff-") as made:
        yield Path(made) / "samples"
