"""The sampling loop reads nothing back from the device: every read would make the host wait for it."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from small_models import tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

import modiff
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.trajectory.session import trajectory

READS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), int(), bool(), `if tensor:`
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}
CONFIGS = {
    "ptq": modiff.QuantConfig.preset("w8a4-ptq-paper"),
    "modiff": modiff.QuantConfig.preset("w8a4-modiff-paper"),
    "no compensation": modiff.QuantConfig(
        modiff.QuantSpec(8, "channel"),
        modiff.QuantSpec(4, "sample", symmetric=False),
        modiff.Modulation(error_compensation=False),
    ),
    "refreshes": modiff.QuantConfig(
        modiff.QuantSpec(8, "channel"), modiff.QuantSpec(3, "sample_channel"), modiff.Modulation(refresh_every=2)
    ),
    "integer warm-up": modiff.QuantConfig(
        modiff.QuantSpec(4, "channel"), modiff.QuantSpec(4, "channel"), modiff.Modulation(warmup="refine")
    ),
}


class HostReads(TorchDispatchMode):
    """Counts operations that hand a tensor's values to Python."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_counter_counts():
    x = torch.ones(2)
    with HostReads() as reads:
        float(x[0])
        if x[1] > 0:
            x.nonzero()
    assert len(reads.found) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_an_evaluation_of_a_student_reads_nothing(name):
    student = modiff.quantize(tiny_unet(), CONFIGS[name])
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    with trajectory(student) as counts, HostReads() as reads:
        for i in range(4):
            student(x * (1 - 0.1 * i), t - i)
    assert counts.total == 4
    assert reads.found == []


@pytest.mark.parametrize("sampler", ["ddim", "ddim_quadratic", "dpmpp_2m", "euler", "flow_euler"])
def test_the_sampling_loop_reads_nothing_from_the_device(sampler):
    # Tensors on the meta device have no values: whatever reads one raises.
    scheduler = make_scheduler(sampler, num_train_timesteps=100)
    devices = []

    def denoiser(x, t):
        devices.append(t.device.type)
        return x * 0.5

    out = sample(denoiser, scheduler, torch.empty(2, 1, 8, 8, device="meta"), steps=5)
    assert out.shape == (2, 1, 8, 8)
    assert devices == ["meta"] * 5


# With the profiler, on a GPU; the same code runs on the CPU, so that it is known to work before there is one.

ON_A_GPU = [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in CONFIGS]
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def waits(denoiser, noise, steps=4):
    """Names of profiled events that hand values to the host in evaluations, or make it wait in the loop.

    The first evaluation, which allocates and loads kernels, is not looked at. The scheduler reads its time steps on the
    host from the host's memory; those reads are no waits, so only reads inside the denoiser count by name.
    """
    cuda = noise.is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    loop = torch.profiler.record_function("loop")

    def watch(i, t, x):
        if i == 1:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            loop.__enter__()

    def named(x, t):
        with torch.profiler.record_function("denoiser"):
            return denoiser(x, t)

    scheduler = make_scheduler("ddim_quadratic", num_train_timesteps=100)
    with torch.profiler.profile(activities=activities) as profile:
        try:
            sample(named, scheduler, noise, steps, on_evaluation=watch)
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
            loop.__exit__(None, None, None)
    events = profile.events()
    whole = next(event.time_range for event in events if event.name == "loop")
    calls = [event.time_range for event in events if event.name == "denoiser" and event.time_range.start >= whole.start]
    assert len(calls) == steps - 1

    def inside(event, span):
        return span.start <= event.time_range.start <= span.end

    found = [e.name for e in events if e.name.startswith(WAITS) and inside(e, whole)]
    reads = [e.name for e in events if e.name == "aten::_local_scalar_dense"]
    assert reads, "the scheduler's own reads should be seen"
    return found + [
        e.name for e in events if e.name == "aten::_local_scalar_dense" and any(inside(e, call) for call in calls)
    ]


@pytest.mark.parametrize(("device", "name"), [("cpu", "modiff"), *ON_A_GPU])
def test_the_profiler_sees_no_wait_in_the_sampling_loop(device, name):
    student = modiff.quantize(tiny_unet().to(device), CONFIGS[name])
    with trajectory(student):
        assert waits(student, torch.randn(2, 1, 8, 8, device=device)) == []


def test_the_profiler_sees_a_read_that_was_built_in():
    def denoiser(x, t):
        return x * (0.5 if x.mean() > 100 else 0.25)

    assert waits(denoiser, torch.randn(2, 1, 8, 8)) == ["aten::_local_scalar_dense"] * 3


@pytest.mark.gpu
def test_a_read_that_was_built_in_is_an_error_on_a_gpu():
    with pytest.raises(RuntimeError, match="synchroniz"):
        waits(lambda x, t: x * float(x.mean()), torch.randn(2, 1, 8, 8, device="cuda"))


def seconds(model, x, t, rounds):
    """Of ``rounds`` evaluations, after three that are not timed."""
    for timed in (False, True):
        if timed and x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds if timed else 3):
            model(x, t)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_ratio(teacher, preset, x, rounds=10):
    """Time of an evaluation of the student, in units of its teacher's under bf16 autocast, and its evaluations."""
    student = modiff.quantize(copy.deepcopy(teacher), modiff.QuantConfig.preset(preset))
    t = torch.tensor(7, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        slow = seconds(teacher, x, t, rounds)
        with trajectory(student) as counts:
            return seconds(student, x, t, rounds) / slow, counts


def test_the_time_ratio_is_taken_over_quantized_evaluations():
    ratio, counts = time_ratio(tiny_unet(), "w8a4-modiff-paper", torch.randn(2, 1, 8, 8), rounds=2)
    assert ratio > 0
    assert (counts.total, counts.quantized) == (5, 4)  # the first, in full precision, is not among the timed ones


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper"])
@pytest.mark.parametrize("recipe", ["teacher_small", "teacher"])
def test_a_simulated_student_takes_at_most_twice_its_teachers_bf16_time_on_a_gpu(recipe, preset):
    import yaml
    from diffusers import UNet2DModel

    text = (Path(__file__).parents[2] / "recipes" / "cifar10" / f"{recipe}.yaml").read_text()
    network = yaml.safe_load(text)["model"]["init_args"]["denoiser"]
    teacher = UNet2DModel(**network).cuda().eval().requires_grad_(False)
    ratio, _ = time_ratio(teacher, preset, torch.randn(256, 3, 32, 32, device="cuda"))
    assert ratio <= 2
