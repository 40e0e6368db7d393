"""Which state a denoiser call gets: by name, by what it is conditioned on, by its place in the step; else a refusal."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.errors import TrajectoryError


class Denoiser(nn.Module):
    """Is told the class ``y``, and may leave a layer out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(3, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t, y=None, skip_layers=None):
        h = self.a(x + 0.01 * t)
        if y is not None:
            h = h + self.embed(y)
        return self.b(torch.tanh(h))

    def forward_with_cfg(self, x, t, y):
        cond, uncond = self.forward(torch.cat([x, x]), t, torch.cat([y, torch.zeros_like(y)])).chunk(2)
        return uncond + 2 * (cond - uncond)


def student(**modulation) -> nn.Module:
    config = QuantConfig(QuantSpec(8, "channel"), QuantSpec(4, "sample", symmetric=False), Modulation(**modulation))
    return modiff.quantize(Denoiser(), config)


def plain() -> nn.Module:
    return modiff.quantize(Denoiser(), QuantConfig(QuantSpec(8, "channel"), QuantSpec(4, "sample")))


X = [torch.randn(2, 8, generator=torch.Generator().manual_seed(i)) * 0.1 + 1 for i in range(50)]
COND, UNCOND = torch.tensor([1, 2]), torch.tensor([0, 0])
TIMES = list(range(50, 0, -1))


def alone(y, first: int = 0, last: int = 50) -> list[torch.Tensor]:
    """What one of the calls gives in a trajectory of its own."""
    with modiff.trajectory(model := student()):
        return [model(X[i], TIMES[i], y) for i in range(first, last)]


@pytest.mark.parametrize("times", [TIMES, [torch.tensor(t) for t in TIMES], [torch.full((2, 1), t) for t in TIMES]])
def test_two_unnamed_calls_per_step_are_refused_with_the_fix(times) -> None:
    model = student()
    with modiff.trajectory(model):
        model(X[0], timestep(times[0]), UNCOND)
        with pytest.raises(TrajectoryError, match=r"at one time step with different conditions.*contexts=\('uncond'"):
            model(X[0], timestep(times[0]), COND)
    with modiff.trajectory(model, contexts=("all",)) as run:  # meant
        for i in range(3):
            model(X[i], timestep(times[i]), UNCOND)
            model(X[i], timestep(times[i]), COND)
    assert (run.total, run.quantized) == (6, 5)


def timestep(t):
    """What a loop hands over: the number, or a tensor made anew."""
    return t.clone() if isinstance(t, torch.Tensor) else t


def test_samplers_that_evaluate_twice_at_one_time_step_are_not_refused() -> None:
    """Heun's corrector and the next predictor share a time step, and have one condition."""
    model = student()
    with modiff.trajectory(model) as run:
        for i in range(4):
            model(X[i], TIMES[i // 2], COND.clone())
    assert run.total == 4


def test_plain_students_have_no_state_to_share() -> None:
    model = plain()
    with modiff.trajectory(model) as run:
        for i in range(3):
            model(X[i], TIMES[i], UNCOND)
            model(X[i], TIMES[i], COND)
    assert run.total == 6


@pytest.mark.parametrize("contexts", [("uncond", "cond"), ("cond", "uncond")])
@pytest.mark.parametrize("fresh", [False, True])
def test_guidance_that_ends_midway_goes_on_in_its_own_state(contexts, fresh) -> None:
    """50 and 25 calls, each as in a trajectory of its own; by position alone they were 38 and 37."""
    model, outputs = student(), []
    labels = {"cond": COND, "uncond": UNCOND}
    with modiff.trajectory(model, contexts=contexts) as run:
        for i in range(50):
            for name in contexts if i < 25 else ("cond",):
                out = model(X[i], TIMES[i], labels[name].clone() if fresh else labels[name])
            outputs.append(out)
    assert {c.name: (c.total, c.quantized) for c in run.contexts.values()} == {"cond": (50, 49), "uncond": (25, 24)}
    for one, other in zip(outputs[25:], alone(COND)[25:], strict=True):
        assert torch.equal(one, other)


def test_guidance_that_begins_midway_warms_up_then() -> None:
    model, last = student(), {}
    with modiff.trajectory(model, contexts=("cond", "uncond")) as run:
        for i in range(20):
            last["cond"] = model(X[i], TIMES[i], COND)
            if 5 <= i < 15:  # an interval
                last["uncond"] = model(X[i], TIMES[i], UNCOND)
    assert {c.name: (c.total, c.quantized) for c in run.contexts.values()} == {"cond": (20, 19), "uncond": (10, 9)}
    assert torch.equal(last["cond"], alone(COND, 0, 20)[-1])
    assert torch.equal(last["uncond"], alone(UNCOND, 5, 15)[-1])


def test_a_layer_skipped_in_some_steps_has_a_state_of_its_own() -> None:
    model = student()
    with modiff.trajectory(model, contexts=("whole", "skip")) as run:
        for i in range(10):
            model(X[i], TIMES[i], COND)
            if 2 <= i < 6:
                model(X[i], TIMES[i], COND, skip_layers=[7])
    assert {c.name: c.total for c in run.contexts.values()} == {"whole": 10, "skip": 4}


def test_one_call_per_step_under_two_names() -> None:
    """``guidance_scale=1`` on what was quantized for guidance."""
    model = student()
    with modiff.trajectory(model, contexts=("uncond", "cond")) as run:
        outputs = [model(X[i], TIMES[i], COND) for i in range(5)]
    assert run.total == 5
    assert len(run.contexts) == 1
    assert torch.equal(outputs[-1], alone(COND, 0, 5)[-1])


def test_calls_that_nothing_tells_apart_are_refused_when_one_is_left_out() -> None:
    model = student()
    with modiff.trajectory(model, contexts=("a", "b")):
        for i in (0, 0, 1, 1, 2):
            model(X[i], TIMES[i], COND)
        with pytest.raises(TrajectoryError, match=r"do not differ in their arguments, so .* run\.context\(name\)"):
            model(X[3], TIMES[3], COND)


@pytest.mark.parametrize("begins", [0, 3])
def test_a_batch_that_doubles_when_guidance_begins_warms_up_again(begins) -> None:
    model = student()
    with modiff.trajectory(model, guidance_may_end=True) as run:
        for i in range(8):
            guided = begins <= i < 6
            x, y = (torch.cat([X[i]] * 2), torch.cat([UNCOND, COND])) if guided else (X[i], COND)
            model(x, TIMES[i], y)
    assert (run.total, run.quantized) == (8, 7 if begins == 0 else 6)


@pytest.mark.parametrize("make", [student, plain])
def test_methods_that_call_the_forward_are_refused_with_the_fix(make) -> None:
    model = make()
    with (
        modiff.trajectory(model),
        pytest.raises(TrajectoryError, match="such as forward_with_cfg, calls self.forward: quantize a wrapper"),
    ):
        model.forward_with_cfg(X[0], 5, COND)


class WithGuidance(nn.Module):
    """The fix."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()

    def forward(self, x, t, y):
        return self.denoiser.forward_with_cfg(x, t, y)


def test_a_wrapper_whose_forward_is_that_method_works() -> None:
    config = QuantConfig.preset("w8a8-modiff")
    model = modiff.quantize(WithGuidance(), config)
    expected = WithGuidance()(X[1], 4, COND)
    with modiff.trajectory(model) as run:
        model(X[0], 5, COND)
        out = model(X[1], 4, COND)
    assert (run.total, run.quantized) == (2, 1)
    assert (out - expected).norm() / expected.norm() < 0.05


def test_a_single_step_says_that_nothing_was_quantized(caplog) -> None:
    model = student()
    with caplog.at_level(logging.WARNING, "modiff"):
        for _ in range(2):
            with modiff.trajectory(model):
                model(X[0], 1, COND)
    assert [r.message for r in caplog.records] == [
        "All evaluations of this trajectory were warm-ups, in which activations are in full precision. With so few "
        "steps use Modulation(warmup='refine'), whose first evaluation is quantized too."
    ]
    caplog.clear()
    for other, evaluations in ((student(warmup="refine"), 1), (student(), 2), (plain(), 1)):
        with modiff.trajectory(other):
            for i in range(evaluations):
                other(X[i], 5 - i, COND)
    assert not caplog.records


def test_copies_keep_what_they_know() -> None:
    model = copy.deepcopy(student())
    with modiff.trajectory(model):
        model(X[0], 1, UNCOND)
        with pytest.raises(TrajectoryError, match="twice at one time step with different conditions"):
            model(X[0], 1, COND)


def test_a_student_in_a_pipeline_that_was_not_wrapped_is_told_how() -> None:
    """Such as one that was loaded into it, or that ``from_pipe`` took over."""
    model = student()
    with pytest.raises(
        TrajectoryError, match=r"a pipeline, also of a loaded student, is wrapped by modiff\.quantize_p"
    ):
        model(X[0], 1, COND)


def test_a_package_that_skips_modules_is_called_what_it_is() -> None:
    model = student()
    original = model.b
    with modiff.trajectory(model):
        model(X[0], 2, COND)
        model.b = nn.Identity()  # what a cache makes of a block in some steps
        with pytest.raises(
            TrajectoryError,
            match="A package that skips modules, .* does not combine with modulation: .*QuantConfig.schedule",
        ):
            model(X[1], 1, COND)
    model.b = original


@pytest.mark.parametrize("until", [20, 15])
@pytest.mark.parametrize("contexts", [("uncond", "cond"), ("cond", "uncond")])
def test_guidance_that_begins_midway_with_the_unconditional_call_first(contexts, until) -> None:
    model, last = student(), {}
    with modiff.trajectory(model, contexts=contexts) as run:
        for i in range(20):
            if 5 <= i < until:
                last["uncond"] = model(X[i], TIMES[i], UNCOND)
            last["cond"] = model(X[i], TIMES[i], COND)
    assert sorted((c.total, c.quantized) for c in run.contexts.values()) == [(until - 5, until - 6), (20, 19)]
    assert torch.equal(last["cond"], alone(COND, 0, 20)[-1])
    assert torch.equal(last["uncond"], alone(UNCOND, 5, until)[-1])


def test_a_trace_of_a_state_is_refused() -> None:
    model = student()
    with (
        modiff.trajectory(model),
        pytest.raises(TrajectoryError, match=r"a trace \(torch\.jit\.trace, .* as constants"),
    ):
        torch.jit.trace(lambda x: model(x, 1, COND), (X[0],), check_trace=False)
