"""Schedules found from trajectories: what is skipped is what changes least, under a share and a longest run."""

from __future__ import annotations

import pytest
import torch
from test_reuse import TIMES, inputs, run, unet

import modiff
from modiff import QuantConfig
from modiff.calibration.schedules import calibrate_schedule, choose_skips, record_errors
from modiff.config.schedule import ReuseSchedule
from modiff.errors import CalibrationError, ConfigError


def sampler(student):
    run(student, inputs((2, 2, 8, 8)))


def test_recorded_errors_are_those_of_real_skips():
    """A block that is skipped in one evaluation is off by exactly the recorded error there."""
    teacher = unet()
    errors, length = record_errors(teacher, QuantConfig(), sampler, "reuse", 2)
    assert length == len(TIMES)
    name, t = "mid_block.resnets.0", 4
    block = teacher.get_submodule(name)
    seen = []
    handle = block.register_forward_hook(lambda m, a, o: seen.append((a[0], o)))
    for x, time in zip(inputs((2, 2, 8, 8)), TIMES, strict=True):
        teacher(x, torch.tensor(time))
    handle.remove()
    branches = [o - a for a, o in seen]
    expected = (branches[t - 1] - branches[t]).norm() / branches[t].norm()
    assert float(errors[name][0, t]) == pytest.approx(float(expected), rel=1e-5)
    assert errors[name][1, 1].isinf()


@pytest.mark.parametrize("mode", ["reuse", "extrapolate"])
def test_schedule_skips_its_share_and_runs(mode):
    schedule = calibrate_schedule(unet(), QuantConfig.preset("w8a8-modiff"), sampler, share=0.25, mode=mode)
    assert schedule.length == len(TIMES)
    pairs = sum(len(times) for _, times in schedule.skipped)
    assert pairs == int(0.25 * len(TIMES) * len(schedule.skipped))
    for _, times in schedule.skipped:
        assert all(b - a > 1 for a, b in zip(times, times[1:], strict=False)), "no run is longer than one"
        assert all(2 <= t < len(TIMES) - 1 for t in times)
    student = modiff.quantize(unet(), QuantConfig(schedule=schedule))
    _, trajectory, _ = run(student, inputs((2, 2, 8, 8)))
    assert trajectory.reused == len({t for _, times in schedule.skipped for t in times})


def test_least_errors_are_skipped_first_and_runs_are_bounded():
    errors = {"a": torch.tensor([[9.0, 9, 1, 2, 3, 4]]), "b": torch.tensor([[9.0, 9, 5, 6, 7, 8]])}
    assert choose_skips(errors, 6, 0.25, 1, 2, 0) == {"a": [2, 4], "b": [2]}
    deep = {name: values.repeat(2, 1) for name, values in errors.items()}
    assert choose_skips(deep, 6, 0.5, 2, 2, 0)["a"] == [2, 3, 5] or len(choose_skips(deep, 6, 0.5, 2, 2, 0)["a"]) == 3


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"share": 1.5}, ConfigError, "share is 1.5; allowed are numbers above 0 and below 1"),
        ({"share": 0.9}, ConfigError, "can be skipped with longest=1"),
        ({"share": 0.3, "longest": 0}, ConfigError, "longest is 0"),
        ({"share": 0.3, "run": lambda student: None}, CalibrationError, "opened no trajectory"),
    ],
)
def test_refusals(kwargs, error, match):
    given = {"run": sampler, **kwargs}
    with pytest.raises(error, match=match):
        calibrate_schedule(unet(), QuantConfig(schedule=ReuseSchedule.preset("reuse-2")), **given)


def test_trajectories_of_several_lengths_are_refused():
    def uneven(student):
        run(student, inputs((2, 2, 8, 8)))
        run(student, inputs((2, 2, 8, 8))[:4])

    with pytest.raises(CalibrationError, match="trajectories have 4 to 7 evaluations"):
        calibrate_schedule(unet(), QuantConfig(), uneven, share=0.3)
