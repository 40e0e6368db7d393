"""Calibrations that two processes share: identical in both, and what one process finds, up to the rounding of sums."""

import os
import sys
from pathlib import Path

import pytest
import torch
from small_models import denoiser, noise
from torch import distributed, multiprocessing, nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.reduction import Reducer, TorchReducer
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.structure import shared_copy
from modiff.calibration.loop.tracing import Trace, merged
from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import CalibrationError
from modiff.student.swap import convert, operators

FAST = CalibrationSettings(
    iterations=6, tuning_iterations=2, evaluations=2, positions=200, samples=10, batch_size=4, stage_size=2
)
TRAJECTORIES = 3


def sampler(rank=0, world=1, trajectories=TRAJECTORIES, fail=None):
    """The trajectories of one process of the run: dealt in turn."""

    def run(student):
        for i in range(rank, trajectories, world):
            with modiff.trajectory(student):
                for step, args in enumerate(noise(3, 2, 10 * i)):
                    if fail == (i, step):
                        args = (args[0] * torch.nan, args[1])
                    student(*args)

    return run


class Block(nn.Module):
    """A residual block, which BRECQ finds."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.second(nn.functional.silu(self.first(x)))


def blocks():
    """A denoiser of two blocks between two convolutions."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(), Block(), nn.Conv2d(8, 3, 3, padding=1))
    return body.eval().requires_grad_(False)


def block_sampler(rank=0, world=1):
    def run(student):
        for i in range(rank, TRAJECTORIES, world):
            with modiff.trajectory(student):
                for x, _ in noise(3, 2, 10 * i):
                    student(x)

    return run


def ranges_config(ranges):
    base = QuantConfig.preset("w4a4-modiff-paper")
    spec = QuantSpec(4, "channel", symmetric=False, range="calibrated", timestep_buckets=2)
    return QuantConfig(base.weight, spec, base.modulation), CalibrationSettings(
        samples=12, batch_size=4, lsq_iterations=5, stage_size=2, ranges=ranges, bins=64
    )


def found_by(method, rank=0, world=1, reducer=None, folder=None, progress=None):
    """Everything that a calibration finds, by name."""
    if method == "brecq":
        student = calibrate(
            blocks(),
            QuantConfig.preset("w3a4-modiff-paper"),
            block_sampler(rank, world),
            method,
            settings=FAST,
            reducer=reducer,
            folder=folder,
            progress=progress,
        )
    elif method in ("minmax", "percentile", "lsq"):
        config, settings = ranges_config(method)
        student = calibrate(
            denoiser(), config, sampler(rank, world), "nearest", settings=settings, reducer=reducer, folder=folder
        )
    else:
        config = QuantConfig.preset("w3a4-modiff-paper")
        student = calibrate(
            denoiser(), config, sampler(rank, world), method, settings=FAST, reducer=reducer, folder=folder
        )
    found = {}
    for name, operator in operators(student).items():
        found[f"{name}.codes"] = operator.packed.codes
        found[f"{name}.weight_scale"] = operator.packed.scale
        if operator.packed.shift is not None:
            found[f"{name}.shift"] = operator.packed.shift
        if operator.calibrated is not None:
            found[f"{name}.scale"], found[f"{name}.zero"] = operator.calibrated.scale, operator.calibrated.zero_point
    return found


def moments_by(rank=0, world=1, reducer=None):
    teacher = denoiser()
    student = convert(shared_copy(teacher), QuantConfig.preset("w4a4-modiff-paper"), True)
    loop = ClosedLoop(student, teacher, sampler(rank, world), reducer)
    trace = loop.trace()
    generator = torch.Generator().manual_seed(5)
    moments = loop.moments(list(trace.order), trace, 2, 90, generator)
    assert generator.initial_seed() == 5
    return trace, {n: (m.hessian, m.cross, m.power, torch.tensor(m.count)) for n, m in moments.items()}


def rows_of(store):
    return store.rows(torch.arange(len(store)))


def samples_by(folder, rank=0, world=1, reducer=None):
    teacher = blocks()
    student = convert(shared_copy(teacher), QuantConfig.preset("w4a4-modiff-paper"), True)
    loop = ClosedLoop(student, teacher, block_sampler(rank, world), reducer)
    trace = loop.trace()
    with SampleStore(folder / f"samples-{rank}", 2**15, "1") as store:  # some rows go to disk
        loop.samples("1", trace, None, 11, store, torch.Generator())
        return rows_of(store)


def failing(rank, world, reducer):
    try:
        run = sampler(rank, world, fail=(1, 2))  # trajectory 1 is the second process's
        calibrate(denoiser(), QuantConfig.preset("w3a4-modiff-paper"), run, "gptq", settings=FAST, reducer=reducer)
    except CalibrationError as error:
        return str(error)
    return None


def full_disk(rank, reducer):
    def fail():
        raise OSError(28, "No space left on device")

    messages = []
    for share in (lambda: reducer.once(fail), lambda: reducer.each(fail if rank == 1 else int)):
        try:
            share()
        except (OSError, CalibrationError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def work(rank, world, folder):
    """One of the processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    reducer = TorchReducer()
    found = {method: found_by(method, rank, world, reducer) for method in METHODS}
    found["kept"] = found_by("gptq", rank, world, reducer, folder / "stages")
    found["read"] = found_by("gptq", rank, world, reducer, folder / "stages")
    found["trace"], found["moments"] = moments_by(rank, world, reducer)
    found["samples"] = samples_by(folder, rank, world, reducer)
    found["extremes"] = [reducer.all_reduce(torch.tensor([rank, -rank]), how) for how in ("min", "max", "sum")]
    found["failing"], found["full"] = failing(rank, world, reducer), full_disk(rank, reducer)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


METHODS = ("gptq", "adaround", "brecq", "minmax", "percentile", "lsq")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    context = multiprocessing.get_context("spawn")
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        processes = [context.Process(target=work, args=(rank, 2, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
    finally:
        os.environ.pop("PYTHONPATH") if previous is None else os.environ.update(PYTHONPATH=previous)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """As in the processes: the number of threads changes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", METHODS)
def test_both_processes_end_with_the_same_bits(two, method):
    assert two[0][method]
    assert any(key.endswith(".shift") for key in two[0][method]) == (method in ("gptq", "adaround", "brecq"))
    assert equal(two[0][method], two[1][method])


@pytest.mark.parametrize("method", ["brecq", "minmax", "percentile", "lsq"])
def test_two_processes_find_what_one_finds(two, method):
    """Samples arrive in the order of trajectories, and these statistics merge exactly: nothing is left to rounding."""
    one = found_by(method)
    assert equal(one, two[0][method])


def test_calibrations_from_sums_differ_by_their_rounding_only(two):
    one = found_by("gptq")
    keys = [key for key in one if key.endswith(".codes")]
    differing = sum(int((one[key] != two[0]["gptq"][key]).sum()) for key in keys)
    assert differing <= 0.01 * sum(one[key].numel() for key in keys)


def test_merged_moments_are_those_of_one_process(two):
    trace, moments = moments_by()
    assert trace.lengths == [3, 3, 3]
    for rank, places in enumerate(([0, 2], [1])):
        other = two[rank]["trace"]
        assert other.mine == places
        assert (other.lengths, other.order, other.calls, other.usable) == (
            trace.lengths,
            trace.order,
            trace.calls,
            trace.usable,
        )
        assert other.digest == trace.digest
        for name, expected in moments.items():
            hessian, cross, power, count = two[rank]["moments"][name]
            assert torch.equal(count, expected[3])  # the very same vectors, in another order of summation
            for found, sums in ((hessian, expected[0]), (cross, expected[1]), (power, expected[2])):
                assert torch.allclose(found, sums, rtol=1e-5, atol=1e-5 * float(sums.abs().max()))
            assert torch.equal(hessian, two[0]["moments"][name][0])


def test_sums_of_processes_are_taken_in_float64():
    seen = []

    def all_reduce(tensor, how):
        seen.append((tensor.dtype, how))
        return tensor * 2

    teacher = denoiser()
    student = convert(shared_copy(teacher), QuantConfig.preset("w4a4-modiff-paper"), True)
    loop = ClosedLoop(student, teacher, sampler())
    moments = loop.moments(["time"], loop.trace(), 2, 90, torch.Generator())["time"]
    hessian, count = moments.hessian.clone(), moments.count
    moments.reduce(all_reduce)
    assert torch.equal(moments.hessian, 2 * hessian)
    assert moments.count == 2 * count
    assert set(seen) == {(torch.float64, "sum"), (torch.int64, "sum")}


def test_samples_of_all_processes_come_in_the_order_of_one(two, tmp_path):
    one = samples_by(tmp_path)
    assert len(one["target"]) == 11
    assert equal(one, two[0]["samples"])
    assert len(two[1]["samples"]["target"]) < 11


def test_extremes_and_sums(two):
    for found in two:
        assert [t.tolist() for t in found["extremes"]] == [[0, -1], [1, 0], [1, -1]]


def test_finished_stages_are_read_by_all(two):
    for found in two:
        assert equal(found["kept"], two[0]["gptq"])
        assert equal(found["read"], two[0]["gptq"])


def test_error_of_one_process_is_that_of_all(two):
    for found in two:
        assert "NaN or Inf in the input of operator" in found["failing"]
        assert "in evaluation 2" in found["failing"]
    for found, own in zip(two, ("OSError", "CalibrationError"), strict=True):
        once, each = found["full"]
        assert once.startswith(own)
        assert each.startswith("CalibrationError" if own == "OSError" else "OSError")
        assert "No space left on device" in once
        assert "No space left on device" in each


def test_one_process_is_a_reducer_by_itself():
    alone = Reducer()
    tensor = torch.ones(2)
    assert alone.all_reduce(tensor, "sum") is tensor
    assert (alone.gather(3), alone.each(lambda: 4), alone.once(lambda: 5)) == ([3], 4, 5)
    with pytest.raises(CalibrationError, match="There is no process group. Call torch.distributed"):
        TorchReducer()


def test_traces_merge_in_turn_and_a_process_may_have_none():
    a = Trace([4, 5], ["x"], {"x": 1}, ["m", "n"], ["a", "c"], 5)
    b = Trace([6], ["x"], {"x": 1}, ["n"], ["b"], 6)
    found = merged([a, b, Trace()], rank=2)
    assert (found.lengths, found.digests, found.mine) == ([4, 6, 5], ["a", "b", "c"], [])
    assert (found.usable, found.steps) == (["n"], 6)
    assert merged([a]).digest != found.digest
    assert merged([Trace(), Trace()]).lengths == []
