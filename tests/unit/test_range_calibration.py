"""Calibrated ranges: found on closed-loop trajectories, learned, resumed, and refused."""

import copy
import dataclasses
import threading

import pytest
import torch
from small_models import denoiser, noise
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.calibration import CalibrationSettings, calibrate, lsq
from modiff.calibration import ranges as ranges_module
from modiff.calibration.capture import ClosedLoop
from modiff.calibration.lsq import learned_quantize, quantizer_of
from modiff.calibration.ranges import RangeCalibration, by_set, with_dynamic_ranges
from modiff.calibration.reduction import Reducer
from modiff.calibration.structure import shared_copy
from modiff.conversion import convert, operators
from modiff.errors import CalibrationError, ConfigError
from modiff.layers.modulated import ModulatedOperator
from modiff.quantizers.calibrated import CalibratedRange, bucket_of

EVALUATIONS = 6
KINDS = ("minmax", "moving_average", "percentile", "lp", "lsq")
FAST = CalibrationSettings(lsq_iterations=20, samples=64, batch_size=8, bins=256, stage_size=2)


def sampler(evaluations=EVALUATIONS, batch=2, seed=0, trajectories=1):
    def run(student):
        for i in range(trajectories):
            with modiff.trajectory(student):
                for args in noise(evaluations, batch, seed + 10 * i):
                    student(*args)

    return run


def config(bits=4, granularity="tensor", symmetric=False, buckets=1, modulation=Modulation(), rules=()):  # noqa: B008
    group = 4 if granularity == "group" else None
    spec = QuantSpec(bits, granularity, symmetric, "calibrated", group_size=group, timestep_buckets=buckets)
    return QuantConfig(QuantSpec(8, "channel"), spec, modulation, rules)


def found_ranges(student):
    return {name: operator.calibrated for name, operator in operators(student).items()}


def calibrated(settings=FAST, run=None, model=None, seed=0, folder=None, progress=None, **fields):
    return calibrate(
        denoiser() if model is None else model,
        config(**fields),
        run or sampler(),
        "nearest",
        seed,
        settings=settings,
        folder=folder,
        progress=progress,
    )


def same(a, b):
    assert a.keys() == b.keys()
    for name, each in a.items():
        assert torch.equal(each.scale, b[name].scale)
        assert each.zero_point is None or torch.equal(each.zero_point, b[name].zero_point)
        assert each.length == b[name].length


def residuals(student, run):
    """What each operator quantizes in each evaluation, by a way of its own: a - â just before the call."""
    seen = {name: {} for name in operators(student)}

    def hook(operator, args):
        here = operator.state.trajectory.current
        modulated = isinstance(operator, ModulatedOperator)
        if not modulated or here.total:
            a_hat = here.caches[operator.name][0].a_hat if modulated else 0
            seen[operator.name].setdefault(here.total, []).append((args[0] - a_hat).clone())

    handles = [operator.register_forward_pre_hook(hook) for operator in operators(student).values()]
    run(student)
    for handle in handles:
        handle.remove()
    return seen


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


# --- learned step sizes -----------------------------------------------------------------------------------------------


def test_the_gradient_of_the_step_size_is_that_of_lsq():
    """Esser et al. 2020, equation 3: -x/s + round(x/s) inside; -Q_N and Q_P beyond."""
    x = torch.tensor([-9.0, -1.3, 0.2, 0.9, 9.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    values = learned_quantize(x, scale, None, QuantSpec(3))
    found = torch.stack([torch.autograd.grad(v, scale, retain_graph=True)[0] for v in values])
    inside = -x / 0.5 + (x / 0.5).round()
    wanted = torch.tensor([-3.0, *inside[1:4].tolist(), 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_the_zero_point_is_that_of_lsq_plus():
    """Bhalgat et al. 2020, equation 6, in codes: nothing inside, minus a step where a code is clamped."""
    x = torch.tensor([-9.0, 0.2, 9.0], dtype=torch.float64)
    zero_point = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    values = learned_quantize(x, torch.tensor(0.5, dtype=torch.float64), zero_point, QuantSpec(3, symmetric=False))
    found = [float(torch.autograd.grad(v, zero_point, retain_graph=True)[0]) for v in values]
    assert found == [-0.5, 0.0, -0.5]


def lsq_case(symmetric, model=None, run=None):
    """Ranges of Lp and of LSQ, found with the same data."""
    settings = dataclasses.replace(FAST, ranges="lp", lsq_iterations=150, lsq_learning_rate=0.05)
    fields = {"bits": 3, "symmetric": symmetric, "buckets": 2}
    make = model or denoiser
    start = calibrated(settings, run, make(), **fields)
    learned = calibrated(dataclasses.replace(settings, ranges="lsq"), run, make(), **fields)
    return start, learned, fields


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_steps_lose_less_in_the_output(symmetric):
    """On the residuals of the closed loop in which they were learned."""
    start, learned, fields = lsq_case(symmetric)
    one = calibrated(dataclasses.replace(FAST, ranges="lp", range_passes=1), **fields)
    # The second pass finds Lp's ranges on the trajectory of the first pass's, and learns on the trajectory of its own.
    assert found_ranges(one).keys() == found_ranges(start).keys()
    student = convert(denoiser(), config(**fields), True, ranges=found_ranges(start))
    seen = residuals(student, sampler())
    losses = {}
    for label, model in {"lp": start, "lsq": learned}.items():
        for name, operator in operators(model).items():
            spec, total = operator.activation_spec, 0.0
            for i, parts in seen[name].items():
                scale, zero_point = operator.calibrated.at(i)
                for x in parts:
                    error = learned_quantize(x, scale, zero_point, spec) - x
                    total += float(operator.product(error, with_bias=False).square().sum())
            losses[label, name] = total
    for name in operators(start):
        assert losses["lsq", name] <= losses["lp", name] * (1 + 1e-5), name
    assert sum(losses["lsq", n] for n in operators(start)) < 0.98 * sum(losses["lp", n] for n in operators(start))


def check_learned_zero_points_follow_their_scales():
    """Trap 6: a range that widens at its upper end only has zero points of its new scale."""
    start = CalibratedRange.from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), QuantSpec(4, symmetric=False), 5)
    factors = torch.tensor([[[0.0]], [[1.5]]])
    scale, zero_point = quantizer_of(factors, start, QuantSpec(4, symmetric=False))
    low = float(-start.zero_point * start.scale)
    assert float(-zero_point * scale) == pytest.approx(low)  # the lower end stays
    assert float((15 - zero_point) * scale) == pytest.approx(
        float((15 - start.zero_point) * start.scale) * 2.718**1.5, 1e-3
    )


def test_trap_6_learned_zero_points_follow_their_scales():
    check_learned_zero_points_follow_their_scales()


def test_trap_6_built_in_learned_scale_with_the_old_zero_point(monkeypatch):
    right = quantizer_of
    monkeypatch.setitem(
        globals(), "quantizer_of", lambda factors, start, spec: (right(factors, start, spec)[0], start.zero_point)
    )
    with pytest.raises(AssertionError):
        check_learned_zero_points_follow_their_scales()


class SplitSkip(nn.Module):
    """Two operators that share what was one with a concatenated input, of halves 30 times apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.skip = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.main(x) + self.skip(0.03 * x + 1)


def run_split(student):
    with modiff.trajectory(student):
        for _, t in noise(EVALUATIONS):
            student(t)


def check_halves_of_a_split_skip_keep_their_own_quantizers():
    _, learned, _ = lsq_case(symmetric=False, model=SplitSkip, run=run_split)
    found = found_ranges(learned)
    ratio = found["main"].scale / found["skip"].scale
    assert (ratio > 10).all()
    for name, seen in residuals(learned, run_split).items():
        for i, parts in seen.items():
            scale, zero_point = found[name].at(i)
            values = torch.cat([x.flatten() for x in parts])
            reach = (15 - 8 - zero_point) * scale  # 3 bits: codes 0 to 7
            assert float(reach) < 4 * float(values.abs().max()), name
            assert float(-zero_point * scale) > -4 * float(values.abs().max()), name


def test_trap_6_halves_of_a_split_skip_keep_their_own_quantizers():
    check_halves_of_a_split_skip_keep_their_own_quantizers()


def test_trap_6_built_in_one_scale_copied_into_both_halves(monkeypatch):
    use = RangeCalibration.use

    def copying(self, found):
        found["skip"] = dataclasses.replace(found["skip"], scale=found["main"].scale)
        use(self, found)

    monkeypatch.setattr(RangeCalibration, "use", copying)
    with pytest.raises(AssertionError):
        check_halves_of_a_split_skip_keep_their_own_quantizers()


def test_learning_that_does_not_help_returns_where_it_began(monkeypatch):
    settings = dataclasses.replace(FAST, ranges="lsq", lsq_learning_rate=1.0, lsq_iterations=2)
    monkeypatch.setattr(lsq, "_output_error", worse_after_the_first_step(lsq._output_error))
    found = calibrated(settings, buckets=2)
    monkeypatch.undo()
    same(found_ranges(found), found_ranges(calibrated(dataclasses.replace(settings, ranges="lp"), buckets=2)))


def worse_after_the_first_step(original):
    starts = {}

    def error(operator, spec, scale, zero_point, rows):
        first = starts.setdefault(operator.name, scale.detach().clone())
        return original(operator, spec, scale, zero_point, rows) + 1e6 * (scale - first).abs().sum()

    return error


# --- what is refused --------------------------------------------------------------------------------------------------


def test_more_buckets_than_steps():
    message = "timestep_buckets is 7, but a trajectory has 6 evaluations only. Use at most 6"
    with pytest.raises(CalibrationError, match=message):
        calibrated(buckets=7)


def test_buckets_that_no_recorded_evaluation_reaches():
    message = "'conv_in' has 6 buckets of time steps, but range_evaluations 3 reaches 3 of them only. Raise it"
    with pytest.raises(CalibrationError, match=message):
        calibrated(dataclasses.replace(FAST, range_evaluations=3), buckets=6)
    calibrated(dataclasses.replace(FAST, range_evaluations=3), buckets=3)


def test_an_operator_that_is_never_called():
    model = denoiser()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(CalibrationError, match="No data captured for operator 'spare'"):
        calibrated(model=model)
    assert type(model.spare) is nn.Linear


def test_nan_in_activations_says_where():
    def run(student):
        with modiff.trajectory(student):
            for i, args in enumerate(noise(4)):
                student(args[0] * (float("nan") if i == 2 else 1), args[1])

    message = r"NaN or Inf in the input of operator 'conv_in' in evaluation 2 \(from 0\)"
    with pytest.raises(CalibrationError, match=message):
        calibrated(run=run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_that_comes_with_the_static_ranges_says_where(monkeypatch, value):
    quantizer_input = ModulatedOperator.quantizer_input

    def broken(self, x):
        found = quantizer_input(self, x)
        if found is not None and self.name == "time" and self.calibrated is not None:
            found = found * value
        return found

    monkeypatch.setattr(ModulatedOperator, "quantizer_input", broken)
    message = r"NaN or Inf in the input of operator 'time' in evaluation 1 \(from 0\)"
    with pytest.raises(CalibrationError, match=message):
        calibrated()


def test_statistics_that_do_not_fit():
    settings = dataclasses.replace(FAST, ranges="lp", bins=200_000, memory_mib=1)
    message = (
        "statistics of operator 'conv_in' take 2 MiB, but memory_mib is 1. Raise it, lower timestep_buckets or bins"
    )
    with pytest.raises(CalibrationError, match=message):
        calibrated(settings)


def test_a_sample_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(CalibrationSettings, "memory", property(lambda self: 2 * 2**10))
    monkeypatch.setattr(ranges_module, "observer_bytes", lambda *_: 0)
    with pytest.raises(CalibrationError, match="One sample of 'conv_out' takes 2056 bytes, but only 2048"):
        calibrated(dataclasses.replace(FAST, ranges="lsq"))


def test_calibrated_ranges_need_a_run():
    with pytest.raises(ConfigError, match="range 'calibrated' needs data. Give run, a function that samples"):
        calibrate(denoiser(), config(), method="nearest")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranges": "max"}, "ranges is 'max'; allowed are minmax, moving_average, percentile, lp, lsq."),
        ({"range_evaluations": 0}, "range_evaluations is 0; give a whole number of at least 1, or None for all."),
        ({"range_passes": 0}, "range_passes is 0; allowed are whole numbers of at least 1."),
        ({"percentile": 101}, "percentile is 101; allowed is 50 to 100."),
        ({"range_norm": 0.5}, "range_norm is 0.5; allowed is 1 to 10."),
        ({"bins": 255}, "bins is 255; give an even number, half of them for negative values."),
        ({"lsq_iterations": 0}, "lsq_iterations is 0; allowed are whole numbers of at least 1."),
        ({"lsq_learning_rate": 2}, "lsq_learning_rate is 2; allowed is 0 to 1."),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**fields)
