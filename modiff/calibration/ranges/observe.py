"""Calibrated ranges of activations, from closed-loop trajectories of the student (trap 7)."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.moments import batched, no_data
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.tracing import Evaluation, Trace, removed
from modiff.calibration.ranges.lsq import learn_steps
from modiff.calibration.settings import CalibrationSettings
from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import CalibrationError
from modiff.operators.dtypes import compute_input
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.quantizers.calibrated import CalibratedRange, bucket_of, check_buckets
from modiff.quantizers.observers import MinMax, Observer, make_observer, observer_bytes
from modiff.student.swap import operators
from modiff.trajectory.session import state_of

Ranges = dict[str, CalibratedRange]


def with_dynamic_ranges(config: QuantConfig) -> QuantConfig:
    """Return the configuration as it is before its ranges are calibrated.

    >>> config = QuantConfig(activation=QuantSpec(4, range="calibrated", timestep_buckets=3))
    >>> with_dynamic_ranges(config).activation == QuantSpec(4)
    True
    """

    def dynamic(spec: Any) -> Any:
        return replace(spec, range="dynamic", timestep_buckets=1) if isinstance(spec, QuantSpec) else spec

    rules = tuple(replace(rule, activation=dynamic(rule.activation)) for rule in config.rules)
    return replace(config, activation=dynamic(config.activation), rules=rules)


@dataclass
class RangeCalibration:
    """Finds the ranges of a student's operators, pass by pass.

    The first pass watches the student with dynamic ranges; each further one watches it with the ranges of the pass
    before, so that the last ranges are found on trajectories like those on which they will be used.

    Args:
        loop: The student, its operators with dynamic ranges, and the run.
        specs: The calibrated spec of each operator.
        trace: Of this run.
        settings: Observer, passes, memory.
    """

    loop: ClosedLoop
    specs: Mapping[str, QuantSpec]
    trace: Trace
    settings: CalibrationSettings

    def __post_init__(self) -> None:
        chosen = self.trace.choose_steps(self.settings.range_evaluations)
        for name, spec in self.specs.items():
            if name not in self.trace.calls:
                raise no_data(name)
            operator = operators(self.loop.student)[name]
            if isinstance(operator, ModulatedOperator):
                operator.apart = True
            check_buckets(spec.timestep_buckets, self.trace.steps)
            filled = {bucket_of(i, spec.timestep_buckets, self.trace.steps) for i in chosen}
            if len(filled) < spec.timestep_buckets:
                raise CalibrationError(
                    f"Operator {name!r} has {spec.timestep_buckets} buckets of time steps, but range_evaluations "
                    f"{self.settings.range_evaluations} reaches {len(filled)} of them only. Raise it, or set it to "
                    "null."
                )

    def run_pass(self, scratch: Path, generator: torch.Generator, last: bool) -> Ranges:
        """Run one pass.

        Args:
            scratch: A folder for samples that do not fit in memory.
            generator: Draws what is recorded.
            last: The last pass, in which step sizes are learned where that is asked for.

        Raises:
            CalibrationError: An activation is NaN or Inf, an operator is never called, or memory does not suffice.
        """
        found: Ranges = {}
        for names in self._chunks():
            found |= self._observe(names)
        if last and self.settings.ranges == "lsq":
            self.use(found)
            names = list(self.specs)
            for i in range(0, len(names), self.settings.stage_size):
                found |= self._learn(names[i : i + self.settings.stage_size], scratch, generator)
        return found

    def use(self, found: Mapping[str, CalibratedRange]) -> None:
        """Make the student quantize with these ranges."""
        for name, each in found.items():
            operator = operators(self.loop.student)[name]
            operator.activation_spec = self.specs[name]
            operator.use_range(each)

    def _chunks(self) -> list[list[str]]:
        """Divide operators into chunks whose statistics fit into the memory together."""
        chunks: list[list[str]] = [[]]
        room = self.settings.memory
        for name, spec in self.specs.items():
            sets = operators(self.loop.student)[name].num_sets(spec)
            size = observer_bytes(self.settings.observer, spec.timestep_buckets, sets, self.settings.bins)
            if size > self.settings.memory:
                raise CalibrationError(
                    f"The statistics of operator {name!r} take {size / 2**20:.0f} MiB, but memory_mib is "
                    f"{self.settings.memory_mib}. Raise it, lower timestep_buckets or bins, or use ranges 'minmax'."
                )
            if size > room:
                chunks.append([])
                room = self.settings.memory
            chunks[-1].append(name)
            room -= size
        return chunks

    def _observe(self, names: Sequence[str]) -> Ranges:
        """Run once and find the ranges of some operators."""
        settings, found = self.settings, operators(self.loop.student)
        main: dict[str, Statistics] = {}
        fallback: dict[str, Statistics] = {}
        for name in names:
            spec, sets = self.specs[name], found[name].num_sets(self.specs[name])
            main[name] = Statistics(
                make_observer(
                    settings.observer,
                    spec.timestep_buckets,
                    sets,
                    bins=settings.bins,
                    percentile=settings.percentile,
                    p=settings.range_norm,
                )
            )
            fallback[name] = Statistics(MinMax(1, sets))

        def watch(name: str, index: int, x: Tensor, quantized: bool) -> None:
            buckets = self.specs[name].timestep_buckets if quantized else 1
            observer = (main if quantized else fallback)[name].observer(self.loop.trajectory)
            for first, values in by_set(found[name], self.specs[name], x):
                observer.update(bucket_of(index, buckets, self.trace.steps), first, values)

        self._watch(names, watch)
        ranges = {}
        for name in names:
            whole, other = (each[name].merged(self.loop.reducer) for each in (main, fallback))
            low, high = fill(*whole.range(self.specs[name]), *other.range(self.specs[name]))
            ranges[name] = CalibratedRange.from_range(low, high, self.specs[name], self.trace.steps)
        return ranges

    def _learn(self, names: Sequence[str], scratch: Path, generator: torch.Generator) -> Ranges:
        """Run once with the ranges found so far, and learn those of some operators."""
        settings, found = self.settings, operators(self.loop.student)
        start = {name: _range_of(found[name]) for name in names}
        chosen = self.trace.choose_steps(settings.range_evaluations)
        stores = {n: SampleStore(scratch / str(i), settings.memory // len(names), n) for i, n in enumerate(names)}
        recorded = len(chosen) * len(self.trace.lengths)
        keys: dict[str, list[int]] = {name: [] for name in names}

        def watch(name: str, index: int, x: Tensor, quantized: bool) -> None:
            if quantized:
                rows = batched(found[name], x)
                share = -(-settings.samples // (recorded * self.trace.calls[name]))
                places = torch.randperm(len(rows), generator=generator)[:share].sort().values.to(rows.device)
                bucket = torch.full((len(places),), bucket_of(index, start[name].buckets, self.trace.steps))
                stores[name].append({"x": rows[places], "bucket": bucket})
                keys[name] += [self.loop.trajectory * self.trace.steps + index] * len(places)

        def learn() -> Ranges:
            return {
                name: learn_steps(found[name], self.specs[name], start[name], stores[name], settings, generator).to(
                    torch.device("cpu")
                )
                for name in names
                if len(stores[name])
            }

        try:
            self._watch(names, watch, generator)
            for name in names:
                stores[name].collect(keys[name], self.loop.reducer)
            device = start[names[0]].scale.device
            return start | {name: each.to(device) for name, each in self.loop.reducer.once(learn).items()}
        finally:
            for store in stores.values():
                store.close()
            shutil.rmtree(scratch, ignore_errors=True)

    def _watch(
        self,
        names: Sequence[str],
        watch: Callable[[str, int, Tensor, bool], None],
        generator: torch.Generator | None = None,
    ) -> None:
        """Run; ``watch(name, evaluation, x, quantized)`` gets what each operator quantizes.

        In the first evaluation of a modulated operator, which quantizes nothing, it gets the input and False.
        """
        found, state = operators(self.loop.student), state_of(self.loop.student)
        chosen, evaluation = set(self.trace.choose_steps(self.settings.range_evaluations)), Evaluation()

        def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            evaluation.start(index, args, kwargs)

        def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            pass

        def hook(operator: QuantizedOperator, args: tuple[Tensor, ...]) -> None:
            assert state.trajectory is not None
            index = state.trajectory.current.total
            x = operator.quantizer_input(args[0]) if index in chosen else None
            quantized = x is not None
            if x is None and index == 0 and isinstance(operator, ModulatedOperator):
                x = compute_input(args[0])
            if x is None:
                return
            if not torch.isfinite(x).all():
                raise CalibrationError(
                    f"NaN or Inf in the input of operator {operator.name!r} in {evaluation}. Check the teacher in this "
                    "dtype, or keep the operator in full precision by a rule."
                )
            watch(operator.name, index, x, quantized)

        with removed([found[name].register_forward_pre_hook(hook) for name in names]):
            self.loop.drive(begin, end, generator)


class Statistics:
    """What an observer sees along the trajectories of all processes: the same bits for any number of them.

    Args:
        empty: An observer that has seen nothing.
    """

    def __init__(self, empty: Observer) -> None:
        self._whole = empty
        self._empty = None if empty.order_free else copy.deepcopy(empty)
        self._parts: dict[int, Observer] = {}

    def observer(self, trajectory: int) -> Observer:
        """Return the observer of a trajectory of this process; it has its own where the order of merging matters."""
        if self._empty is None:
            return self._whole
        if trajectory not in self._parts:
            self._parts[trajectory] = copy.deepcopy(self._empty)
        return self._parts[trajectory]

    def merged(self, reducer: Reducer) -> Observer:
        """Return the observer of all trajectories, merged in their order."""
        if self._empty is None:
            if reducer.world_size > 1:
                self._whole.reduce(reducer.all_reduce)
            return self._whole
        parts = {place: part for found in reducer.gather(self._parts) for place, part in found.items()}
        for place in sorted(parts):
            self._whole.merge(parts[place])
        return self._whole


def _range_of(operator: QuantizedOperator) -> CalibratedRange:
    assert operator.calibrated is not None
    return operator.calibrated


def by_set(operator: QuantizedOperator, spec: QuantSpec, x: Tensor) -> list[tuple[int, Tensor]]:
    """Sort the values of an operator's input by the sets that share a scale.

    Returns:
        Pairs of the first set, and values ``[samples, sets, n]`` of it and those that follow it.
    """
    x = batched(operator, x)
    channels = (
        (x.movedim(-1, 1) if operator.adapter.kind == "linear" else x).flatten(2) if x.ndim > 2 else x[:, :, None]
    )
    if spec.granularity == "tensor":
        return [(0, channels.flatten(1)[:, None])]
    if spec.granularity == "channel":
        return [(0, channels)]
    assert spec.group_size is not None
    whole = channels.shape[1] // spec.group_size
    parts = []
    if whole:
        full = channels[:, : whole * spec.group_size]
        parts.append((0, full.reshape(len(x), whole, spec.group_size * channels.shape[2])))
    if whole * spec.group_size < channels.shape[1]:  # the last group is short
        parts.append((whole, channels[:, whole * spec.group_size :].flatten(1)[:, None]))
    return parts


def fill(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> tuple[Tensor, Tensor]:
    """Fill buckets in which nothing was quantized with the range of the next bucket with data, else of the one before.

    Such are the bucket of the first evaluation alone, and refreshes. An operator that never quantized anything, because
    its input was fixed, gets the range of that input: no residual of it can be more than twice as large.

    Args:
        low: ``[buckets, sets]``, infinite without data.
        high: ``[buckets, sets]``, infinite without data.
        other_low: ``[1, sets]`` of the input itself.
        other_high: ``[1, sets]`` of the input itself.

    >>> nothing = float("inf")
    >>> fill(torch.tensor([[nothing], [-2.0], [nothing]]), torch.tensor([[-nothing], [3.0], [-nothing]]),
    ...      torch.tensor([[-9.0]]), torch.tensor([[9.0]]))[0].flatten().tolist()
    [-2.0, -2.0, -2.0]
    """
    seen = torch.isfinite(low).all(dim=1).nonzero().flatten().tolist()
    if not seen:
        return other_low.expand_as(low), other_high.expand_as(high)
    source = [next((s for s in seen if s >= bucket), seen[-1]) for bucket in range(len(low))]
    return low[source], high[source]
