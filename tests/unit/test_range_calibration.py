"""Calibrated ranges: found on closed-loop trajectories, merged over ranks, resumed."""

import copy
import dataclasses
import threading

import pytest
import torch
from range_cases import EVALUATIONS, FAST, calibrated, config, found_ranges, residuals, run_split, same, sampler
from small_models import denoiser, noise
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.calibration import calibrate
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.ranges.observe import RangeCalibration, by_set, with_dynamic_ranges
from modiff.errors import CalibrationError
from modiff.operators.modulated import ModulatedOperator
from modiff.quantizers.calibrated import CalibratedRange, bucket_of
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators

KINDS = ("minmax", "moving_average", "percentile", "lp", "lsq")


def check_ranges_are_those_of_the_closed_loop(passes, modulation, buckets, symmetric=False):
    """Trap 7: the ranges are the extremes of what the student quantizes, with the ranges of the pass before."""
    run = sampler(trajectories=2)
    fields = {"buckets": buckets, "symmetric": symmetric, "modulation": modulation, "bits": 3}
    found = calibrated(dataclasses.replace(FAST, range_passes=passes), run, **fields)
    before = config(**fields)
    if passes == 1:
        student = modiff.quantize(denoiser(), with_dynamic_ranges(before))
    else:
        one = calibrated(dataclasses.replace(FAST, range_passes=passes - 1), run, **fields)
        student = convert(denoiser(), before, True, ranges=found_ranges(one))
    for name, seen in residuals(student, run).items():
        spec, first = before.activation, 0 if modulation is None else 1
        low, high = torch.zeros(buckets, 1), torch.zeros(buckets, 1)
        for bucket in range(buckets):
            mine = [i for i in range(first, EVALUATIONS) if bucket_of(i, buckets, EVALUATIONS) == bucket]
            values = torch.cat([x.flatten() for i in mine or [first] for x in seen[i]])
            low[bucket], high[bucket] = values.min(), values.max()
        wanted = CalibratedRange.from_range(low, high, spec, EVALUATIONS)
        same({name: found_ranges(found)[name]}, {name: wanted})


@pytest.mark.parametrize("modulation", [None, Modulation(), Modulation(error_compensation=False)])
@pytest.mark.parametrize("buckets", [1, 4, EVALUATIONS])
@pytest.mark.parametrize("passes", [1, 2])
def test_trap_7_ranges_are_those_of_the_closed_loop(passes, buckets, modulation):
    check_ranges_are_those_of_the_closed_loop(passes, modulation, buckets)


def test_trap_7_built_in_open_loop_differences(monkeypatch):
    last = {}

    def open_loop(self, x):
        found = x - last[self.name] if self.name in last else None
        last[self.name] = x.clone()
        return found if self.state.trajectory.current.total else None

    monkeypatch.setattr(ModulatedOperator, "quantizer_input", open_loop)
    with pytest.raises(AssertionError):
        check_ranges_are_those_of_the_closed_loop(2, Modulation(), 1)


def test_trap_7_built_in_the_last_pass_with_dynamic_ranges(monkeypatch):
    use = RangeCalibration.use
    monkeypatch.setattr(RangeCalibration, "use", lambda self, found: None)
    with pytest.raises(AssertionError):
        check_ranges_are_those_of_the_closed_loop(2, Modulation(), 1)
    monkeypatch.setattr(RangeCalibration, "use", use)
    check_ranges_are_those_of_the_closed_loop(2, Modulation(), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("granularity", "symmetric"), [("tensor", True), ("channel", False), ("group", False)])
def test_the_same_seed_gives_the_same_bits_and_the_student_samples(kind, granularity, symmetric):
    settings = dataclasses.replace(FAST, ranges=kind)
    first, second = (calibrated(settings, granularity=granularity, symmetric=symmetric, buckets=3) for _ in range(2))
    same(found_ranges(first), found_ranges(second))
    inputs = noise(EVALUATIONS, seed=7)
    with modiff.trajectory(first) as counts:
        outputs = [first(*args) for args in inputs]
    assert counts.quantized == EVALUATIONS - 1
    teacher = denoiser()
    errors = [float((o - teacher(*a)).norm() / teacher(*a).norm()) for o, a in zip(outputs, inputs, strict=True)]
    assert max(errors) < 0.3
    assert max(errors[1:]) > 1e-3  # activations are quantized


@pytest.mark.parametrize("kind", ["minmax", "percentile", "lp"])
def test_how_images_are_batched_does_not_matter(kind):
    """Two trajectories of one image, one of two: plain operators of one layer see the same values."""
    values = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def run(size):
        def sample(student):
            for rows in torch.arange(4).split(size):
                with modiff.trajectory(student):
                    for x in values:
                        student(x[rows])

        return sample

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5))

    settings = dataclasses.replace(FAST, ranges=kind)
    found = [found_ranges(calibrated(settings, run(n), model(), modulation=None, buckets=3)) for n in (1, 2, 4)]
    same(found[0], found[1])
    same(found[0], found[2])


def test_merged_over_ranks_the_ranges_are_those_of_all_trajectories():
    """Each rank has its own trajectories, and the reduced statistics; the sums and extremes are of both."""
    fields = {"buckets": 3, "granularity": "channel"}
    made = denoiser()  # once: threads that draw weights from the one global generator would mix them up

    def job(run, reducer=None):
        teacher, each = copy.deepcopy(made), config(**fields)
        student = convert(shared_copy(teacher), with_dynamic_ranges(each), True)
        loop = ClosedLoop(student, shared_copy(teacher), run, reducer)
        specs = {name: each.activation for name in operators(student)}
        settings = dataclasses.replace(FAST, ranges="percentile")
        return RangeCalibration(loop, specs, loop.trace(), settings)

    runs, barrier, board, found = [sampler(seed=0), sampler(seed=50)], threading.Barrier(2), {}, {}
    how = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}

    class Threads(Reducer):
        world_size = 2

        def __init__(self, rank):
            self.rank = rank

        def gather(self, value):
            board[self.rank] = copy.deepcopy(value)
            barrier.wait(60)
            values = [board[0], board[1]]
            barrier.wait(60)
            return values

        def all_reduce(self, tensor, op):
            return how[op](*self.gather(tensor))

    def work(rank):
        found[rank] = job(runs[rank], Threads(rank)).run_pass(None, torch.Generator(), last=False)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def both(student):
        for run in runs:
            run(student)

    whole = job(both).run_pass(None, torch.Generator(), last=False)
    same(found[0], whole)
    same(found[1], whole)
    alone = job(runs[0]).run_pass(None, torch.Generator(), last=False)
    assert not torch.equal(alone["conv_in"].scale, whole["conv_in"].scale)


@pytest.mark.parametrize("kind", ["lp", "lsq"])
def test_little_memory_takes_more_runs_and_changes_nothing(kind):
    calls = []

    def counted(student):
        calls.append(1)
        sampler()(student)

    settings = dataclasses.replace(FAST, ranges=kind, bins=65536, memory_mib=64)
    whole = calibrated(settings, counted, buckets=3)
    many = len(calls)
    few = calibrated(dataclasses.replace(settings, memory_mib=2), counted, buckets=3)
    assert len(calls) - many > many
    same(found_ranges(whole), found_ranges(few))


def test_interrupted_it_goes_on_with_the_same_bits(tmp_path):
    settings = dataclasses.replace(FAST, ranges="lsq", range_passes=3)
    whole, stages = calibrated(settings, buckets=2), []

    def stop(done, total, what):
        stages.append((done, total, what))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(settings, buckets=2, folder=tmp_path, progress=stop)
    assert stages == [(1, 3, "ranges, pass 1"), (2, 3, "ranges, pass 2")]
    runs = []

    def counted(student):
        runs.append(1)
        sampler()(student)

    resumed = calibrated(settings, counted, buckets=2, folder=tmp_path)
    same(found_ranges(whole), found_ranges(resumed))
    assert len(runs) == 1 + 1 + 2  # the trace, the last pass, and the two groups of operators whose steps are learned
    runs.clear()
    same(found_ranges(whole), found_ranges(calibrated(settings, counted, buckets=2, folder=tmp_path)))
    assert len(runs) == 1
    with pytest.raises(CalibrationError, match="holds a calibration of another settings"):
        calibrated(FAST, buckets=2, folder=tmp_path)


def test_weights_come_first():
    said = []
    model = calibrate(
        denoiser(),
        config(buckets=2),
        sampler(),
        "gptq",
        settings=FAST,
        progress=lambda done, total, what: said.append(what),
    )
    assert said[:2] == ["conv_in, time", "conv_out"]
    assert said[-2:] == ["ranges, pass 1", "ranges, pass 2"]
    weights = [operator.packed.codes for operator in operators(model).values()]
    nearest = [operator.packed.codes for operator in operators(calibrated(buckets=2)).values()]
    assert not all(torch.equal(a, b) for a, b in zip(weights, nearest, strict=True))


def test_only_what_the_rules_say_is_calibrated(tmp_path):
    rules = (Rule("time", activation=QuantSpec(8, "sample")), Rule("conv_in", activation=None))
    model = calibrated(rules=rules, buckets=2)
    assert {name: each is not None for name, each in found_ranges(model).items()} == {
        "conv_in": False,
        "time": False,
        "conv_out": True,
    }
    loaded = modiff.load(modiff.save(model, tmp_path / "ckpt"), denoiser())
    with modiff.trajectory(model), modiff.trajectory(loaded):
        for args in noise(EVALUATIONS):
            assert torch.equal(model(*args), loaded(*args))


def test_an_input_that_is_fixed_gets_the_range_of_itself():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, prompt):
            return self.out(x + self.key(prompt))

    torch.manual_seed(0)
    prompt = 3 * torch.randn(2, 4)

    def run(student):
        with modiff.trajectory(student):
            for _, t in noise(5):
                student(t, prompt)

    found = found_ranges(calibrated(run=run, model=Prompted(), symmetric=True))
    assert float(found["key"].scale) == pytest.approx(float(prompt.abs().max()) / 7)


class SharedInput(nn.Module):
    """Two operators that read one tensor, as queries and keys do; with dynamic ranges they share â."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.query(x) + self.key(x)


def check_operators_that_read_one_tensor_have_one_range():
    settings = dataclasses.replace(FAST, range_passes=1)
    found = found_ranges(calibrated(settings, run=run_split, model=SharedInput(), bits=8))
    assert torch.equal(found["query"].scale, found["key"].scale)


def test_operators_that_read_one_tensor_have_one_range():
    check_operators_that_read_one_tensor_have_one_range()


def test_the_error_that_the_first_of_them_left_is_no_range(monkeypatch):
    """Built in: the second one is watched after the first one advanced the â of both."""
    monkeypatch.setattr(
        ModulatedOperator, "apart", property(lambda self: False, lambda self, value: None), raising=False
    )
    with pytest.raises(AssertionError):
        check_operators_that_read_one_tensor_have_one_range()


def test_contexts_count_their_own_evaluations():
    def run(student):
        with modiff.trajectory(student, contexts=("uncond", "cond")):
            for args in noise(5):
                student(*args)
                student(*args)

    model = calibrated(run=run, buckets=5)
    assert {each.length for each in found_ranges(model).values()} == {5}
    run(model)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize(("operator", "shape"), [("time", (2, 4)), ("conv_in", (2, 3, 5, 5)), ("conv_in", (3, 5, 5))])
def test_values_are_dealt_to_the_sets_of_the_partition(operator, shape, granularity):
    spec = config(granularity=granularity).activation
    spec = dataclasses.replace(spec, group_size=3 if granularity == "group" else None)
    student = modiff.quantize(denoiser(), QuantConfig(None, spec))
    each, x = operators(student)[operator], torch.randn(shape)
    low, high = each.partition(x.ndim).range(x)
    parts = by_set(each, spec, x)
    assert torch.equal(torch.cat([v.amin(dim=(0, 2)) for _, v in parts]), low.flatten())
    assert torch.equal(torch.cat([v.amax(dim=(0, 2)) for _, v in parts]), high.flatten())
    assert sum(v.numel() for _, v in parts) == x.numel()
    assert [first for first, _ in parts] == [0, 1][: len(parts)]
