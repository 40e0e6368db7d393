"""Calibrations that several processes share find the bits that one process finds, in each of them."""

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
from modiff.calibration.loop.sums import MomentSums
from modiff.calibration.loop.tracing import Trace, merged
from modiff.calibration.ranges.observe import Statistics
from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import CalibrationError
from modiff.quantizers.observers import MovingAverage
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators

pytestmark = pytest.mark.timeout(900)  # three processes import PyTorch

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
    elif method in RANGES:
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


def moments_by(folder, rank=0, world=1, reducer=None):
    teacher = denoiser()
    student = convert(shared_copy(teacher), QuantConfig.preset("w4a4-modiff-paper"), True)
    loop = ClosedLoop(student, teacher, sampler(rank, world), reducer)
    trace = loop.trace()
    generator = torch.Generator().manual_seed(5)
    moments = loop.moments(list(trace.order), trace, 2, 90, generator, folder / f"moments-{rank}", 2**14)
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


def work(rank, folder):
    """One of the processes: a member of the group of three, then of that of two."""
    torch.set_num_threads(1)
    for world in (3, 2)[: 2 - rank // 2]:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
        reducer = TorchReducer()
        found = {method: found_by(method, rank, world, reducer) for method in METHODS}
        if world == 2:
            look_closer(found, rank, world, reducer, folder)
        torch.save(found, folder / f"{world}-{rank}.pt")
        distributed.destroy_process_group()


def look_closer(found, rank, world, reducer, folder):
    """What is shared on the way to a calibration, and what goes wrong on it."""
    found["kept"] = found_by("gptq", rank, world, reducer, folder / "stages")
    found["read"] = found_by("gptq", rank, world, reducer, folder / "stages")
    found["trace"], found["moments"] = moments_by(folder, rank, world, reducer)
    found["samples"] = samples_by(folder, rank, world, reducer)
    found["extremes"] = [reducer.all_reduce(torch.tensor([rank, -rank]), how) for how in ("min", "max", "sum")]
    found["failing"], found["full"] = failing(rank, world, reducer), full_disk(rank, reducer)


RANGES = ("minmax", "moving_average", "percentile", "lsq")
METHODS = ("gptq", "adaround", "brecq", *RANGES)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What each of the processes found, by the size of their group."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    context = multiprocessing.get_context("spawn")
    previous = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        processes = [context.Process(target=work, args=(rank, folder)) for rank in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(800)
    finally:
        os.environ.pop("PYTHONPATH") if previous is None else os.environ.update(PYTHONPATH=previous)
    assert [process.exitcode for process in processes] == [0] * 3
    return {n: [torch.load(folder / f"{n}-{r}.pt", weights_only=False) for r in range(n)] for n in (2, 3)}


@pytest.fixture(scope="module")
def two(shared):
    return shared[2]


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
def test_any_number_of_processes_finds_what_one_finds(shared, method):
    one = found_by(method)
    assert any(key.endswith(".shift") for key in one) == (method in ("gptq", "adaround", "brecq"))
    assert any(key.endswith(".zero") for key in one) == (method in RANGES)
    for found in (*shared[2], *shared[3]):
        assert equal(one, found[method])


def test_moments_of_several_processes_are_those_of_one_bit_for_bit(two, tmp_path):
    trace, moments = moments_by(tmp_path)
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
        assert list(two[rank]["moments"]) == trace.order[rank::2]  # each process adds up those of its own operators
        for name, sums in two[rank]["moments"].items():
            assert all(torch.equal(found, expected) for found, expected in zip(sums, moments[name], strict=True))


def test_sums_are_taken_in_the_order_of_trajectories_whoever_has_them(tmp_path):
    """Terms whose float sum depends on its order: 2^24 + 1 + 1 is 2^24, and 1 + 1 + 2^24 is not."""
    teacher = nn.Linear(1, 1, bias=False)
    student = modiff.quantize(nn.Sequential(teacher), QuantConfig.preset("w4a4-ptq-paper"))
    operator = operators(student)
    terms = {0: 2.0**12, 1: 1.0, 2: 1.0}

    class Board(Reducer):
        """Stands for the first of two processes; what the other one sent lies ready."""

        world_size, other = 2, None

        def gather(self, value):
            return [value, self.other]

    def add(sums, trajectories):
        for place in trajectories:
            x = torch.full((1, 1, 1), terms[place])
            sums.add("0", place, x, x)

    alone = MomentSums(operator, Reducer(), tmp_path, 0)
    add(alone, (0, 1, 2))
    expected = alone.finish()["0"].hessian.item()
    for mine in ((0, 2), (1, 2), (2,), ()):
        theirs = [place for place in terms if place not in mine]
        board = Board()
        board.other = (
            [(p, 1) for p in theirs],
            {k: torch.tensor([terms[p] for p in theirs])[:, None, None] for k in "xy"},
        )
        sums = MomentSums(operator, board, tmp_path, 2**10)
        add(sums, mine)
        assert sums.finish()["0"].hessian.item() == expected == 2.0**24


def test_moving_averages_are_merged_in_the_order_of_trajectories():
    """2^60, 1 and -2^60 add up to 0 or to 1: only the order of trajectories decides."""
    values = {0: 2.0**60, 1: 1.0, 2: -(2.0**60)}

    class Board(Reducer):
        other = {}

        def gather(self, value):
            return [value, self.other]

    found = []
    for mine in ((0, 1, 2), (0, 2), (1,), ()):
        board = Board()
        own, other = Statistics(MovingAverage(1, 1)), Statistics(MovingAverage(1, 1))
        for place, value in values.items():
            (own if place in mine else other).observer(place).update(0, 0, torch.full((1, 1, 1), value))
        board.other = other._parts
        found.append(own.merged(board).low_sum.item())
    assert found == [0.0] * 4


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
