"""The sampling loop reads nothing back from the device: every read would make the host wait for it."""

from __future__ import annotations

import time

import pytest
import torch
from small_models import tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

import modiff
from modiff.layers.state import trajectory
from modiff.teachers.sampling import sample
from modiff.teachers.schedulers import make_scheduler

READS = {
    torch.ops.aten._local_scalar_dense.default,  # .item(), int(), bool(), `if tensor:`
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}
CONFIGS = {
    "ptq": modiff.QuantConfig.preset("w8a4-ptq"),
    "modiff": modiff.QuantConfig.preset("w8a4-modiff"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_no_host_sync_in_the_sampling_loop_on_a_gpu(name):
    student = modiff.quantize(tiny_unet().cuda(), CONFIGS[name])
    noise = torch.randn(2, 1, 8, 8, device="cuda")
    scheduler = make_scheduler("ddim_quadratic", num_train_timesteps=100)
    marks = []

    def watch(i, t, x):  # the first evaluation allocates, loads kernels and may wait
        if i == 1:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        marks.append(i)

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        with trajectory(student), torch.profiler.profile(activities=activities) as profile:
            sample(student, scheduler, noise, 6, on_evaluation=watch)
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reads = {event.key: event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"}
    assert marks == list(range(6))
    assert reads == {}


@pytest.mark.gpu
def test_a_simulated_student_takes_at_most_twice_its_teachers_bf16_time_on_a_gpu():
    import copy

    from diffusers import UNet2DModel

    teacher = UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 256)).cuda().eval().requires_grad_(False)
    student = modiff.quantize(copy.deepcopy(teacher), modiff.QuantConfig.preset("w8a4-modiff"))
    x, t = torch.randn(256, 3, 32, 32, device="cuda"), torch.tensor(7, device="cuda")

    def seconds(model):
        for _ in range(3):
            model(x, t)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            model(x, t)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        slow = seconds(teacher)
        with trajectory(student):
            assert seconds(student) <= 2 * slow
