"""Steps of a pipeline are counted without a trace on the scheduler, which others hold too."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

import modiff
from modiff.errors import ConfigError, TrajectoryError


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.b = nn.Embedding(2, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t, y):
        return self.b(torch.tanh(self.a(x + 0.001 * t) + self.embed(y)))


class Pipe:
    """Guidance in two calls per step, unless ``calls`` says otherwise."""

    def __init__(self, scheduler=None, calls=2, inside=False) -> None:
        self.unet, self.scheduler, self.calls, self.inside = Unet(), scheduler or DDIMScheduler(), calls, inside
        self.during = lambda: None

    @property
    def components(self):
        return {"unet": self.unet, "scheduler": self.scheduler}

    def __call__(self, steps=4, guided=99):
        scheduler = EulerDiscreteScheduler() if self.inside else copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        x = torch.linspace(-1, 1, 16).reshape(2, 8)
        for i, t in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(x, t)
            labels = range(self.calls) if i < guided else [self.calls - 1]
            outputs = [self.unet(inputs, t, torch.full((2,), k)) for k in labels]
            x = scheduler.step(sum(outputs) / len(outputs), t, x).prev_sample
            self.during()
        return x


NAMES = ("uncond", "cond")


def test_nobody_sees_that_steps_are_counted() -> None:
    scheduler = DDIMScheduler()
    step, members = DDIMScheduler.step, set(vars(DDIMScheduler))
    pipe = modiff.quantize_pipeline(Pipe(scheduler), "w8a8-modiff", contexts=NAMES)
    seen = []

    def during() -> None:
        seen.append(type(scheduler) is DDIMScheduler)
        seen.append(type(pickle.loads(pickle.dumps(scheduler))) is DDIMScheduler)
        seen.append(type(copy.deepcopy(scheduler)) is DDIMScheduler)

    pipe.during = during
    pipe()
    assert seen == [True] * 12
    assert DDIMScheduler.step is step
    assert set(vars(DDIMScheduler)) - {"__slotnames__"} == members - {"__slotnames__"}  # which pickle adds
    assert vars(scheduler).keys() == vars(DDIMScheduler()).keys()


def test_two_pipelines_share_a_scheduler_in_two_threads() -> None:
    scheduler, step = DDIMScheduler(), DDIMScheduler.step
    pipes = [modiff.quantize_pipeline(Pipe(scheduler), "w8a8-modiff", contexts=NAMES) for _ in range(2)]
    alone, results, barrier = pipes[0](), {}, threading.Barrier(2)

    def work(i: int) -> None:
        pipes[i].during = lambda: barrier.wait(60)  # both are always within their calls
        try:
            results[i] = pipes[i]()
        except Exception as error:  # the thread would swallow it
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(isinstance(r, torch.Tensor) and torch.equal(r, alone) for r in results.values()), results
    assert type(scheduler) is DDIMScheduler
    assert DDIMScheduler.step is step
    pickle.dumps(scheduler)


def test_the_functions_come_back_after_an_error() -> None:
    step = EulerDiscreteScheduler.step
    pipe = modiff.quantize_pipeline(Pipe(EulerDiscreteScheduler()), "w8a8-modiff")
    with pytest.raises(TrajectoryError, match="called twice in one step"):
        pipe()
    assert EulerDiscreteScheduler.step is step


def test_one_pipeline_in_two_threads_is_refused_with_the_fix() -> None:
    pipe = modiff.quantize_pipeline(Pipe(calls=1), "w8a8-modiff")
    found = []

    def during() -> None:
        try:
            pipe()
        except TrajectoryError as error:
            found.append(str(error))

    pipe.during = during
    pipe(1)
    assert "with a lock around the call, or have a deepcopy each" in found[0]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_scheduler_made_inside_the_call(calls) -> None:
    pipe = modiff.quantize_pipeline(
        Pipe(calls=calls, inside=True), "w8a8-modiff", contexts=NAMES if calls > 1 else None
    )
    pipe()
    run = pipe.trajectories["unet"]
    assert (run.total, run.quantized) == (4 * calls, 3 * calls)
    if calls > 1:
        modiff.restore_pipeline(pipe)
        with pytest.raises(TrajectoryError, match=r"contexts=\('uncond', 'cond'\)"):
            modiff.quantize_pipeline(pipe, "w8a8-modiff")()


@pytest.mark.parametrize("inside", [False, True])
def test_guidance_that_ends_midway(inside) -> None:
    pipe = modiff.quantize_pipeline(Pipe(inside=inside), "w8a8-modiff", contexts=NAMES)
    pipe(6, guided=3)
    counts = {c.name: (c.total, c.quantized) for c in pipe.trajectories["unet"].contexts.values()}
    assert counts == {"uncond": (3, 2), "cond": (6, 5)}


@pytest.mark.parametrize("name", ["w8a8-ptq", "w8a32-modiff", "w32a32-modiff"])
def test_students_without_state_need_no_contexts(name) -> None:
    pipe = modiff.quantize_pipeline(Pipe(), name)
    pipe()
    assert pipe.trajectories["unet"].total == 8


def test_restoring_from_a_teacher(tmp_path) -> None:
    expected = Pipe()()
    pipe = modiff.quantize_pipeline(Pipe(), "w4a8-modiff", contexts=NAMES, keep_teacher=False)
    with pytest.raises(ConfigError, match="Give the teacher"):
        modiff.restore_pipeline(pipe)
    with pytest.raises(ConfigError, match="The teacher given has no module 'unet'"):
        modiff.restore_pipeline(pipe, teacher=type("P", (Pipe,), {"components": {"x": nn.Linear(1, 1)}})())
    assert torch.equal(modiff.restore_pipeline(pipe, teacher=Pipe())(), expected)
    modiff.quantize_pipeline(pipe, "w4a8-modiff", contexts=NAMES)
    modiff.save(pipe.unet, tmp_path / "s")
    other = Pipe()
    modiff.load(tmp_path / "s", other.unet)
    modiff.quantize_pipeline(other, contexts=NAMES)
    assert torch.equal(other(), pipe())
    assert torch.equal(modiff.restore_pipeline(other, teacher=Unet())(), expected)
