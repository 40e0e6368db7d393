"""Recorded evaluations, with a recorder that runs the function again in place of a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorders import Again, look_outputs_up
from small_models import config, denoiser, noise
from torch import Tensor

import modiff
from modiff.compiling.graphs import WARM_UPS, use_graphs
from modiff.compiling.modes import uncompile
from modiff.errors import ConfigError, TrajectoryError
from modiff.student.swap import operators
from modiff.trajectory.graphs import in_graph
from modiff.trajectory.session import state_of


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    Again.made = []
    look_outputs_up(monkeypatch)


def run(student: Any, seed: int = 0, evaluations: int = 7, batch: int = 2) -> tuple[list[Tensor], Any]:
    with modiff.trajectory(student) as counts:
        found = [student(*args) for args in noise(evaluations, batch, seed)]
    return found, counts


def pair(preset: str = "w8a4-modiff-paper", **modulation: Any) -> tuple[Any, Any]:
    plain = modiff.quantize(denoiser(), config(preset, **modulation))
    graphed = modiff.quantize(denoiser(), config(preset, **modulation))
    use_graphs(graphed, recorder=Again)
    return plain, graphed


@pytest.mark.parametrize("int16", [False, True])
def test_trajectories_are_the_same_and_the_second_one_is_replayed_from_the_start(int16: bool) -> None:
    plain, graphed = pair(**({"reconstruction_dtype": "int16"} if int16 else {"state_dtype": None}))
    for trajectory, replays in ((0, 7 - 1 - WARM_UPS), (1, 2 * (7 - 1) - WARM_UPS)):
        expected, counts = run(plain, trajectory)
        found, ours = run(graphed, trajectory)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert (ours.total, ours.quantized) == (counts.total, counts.quantized) == (7, 6)
        assert [each.replays for each in Again.made] == [replays]


def test_another_batch_gets_a_recording_of_its_own() -> None:
    plain, graphed = pair()
    for batch in (2, 3):
        expected, _ = run(plain, 0, batch=batch)
        assert all(torch.equal(a, b) for a, b in zip(run(graphed, 0, batch=batch)[0], expected, strict=True))
    assert len(Again.made) == 2


def test_refreshes_run_eagerly() -> None:
    plain, graphed = pair(refresh_every=3)
    expected, counts = run(plain)
    found, ours = run(graphed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.quantized == counts.quantized


def test_calibrated_scales_of_each_evaluation_are_copied_in() -> None:
    from modiff.quantizers.calibrated import CalibratedRange

    def calibrated(student: Any) -> Any:
        for operator in operators(student).values():
            operator.use_range(CalibratedRange(torch.linspace(0.02, 0.2, 7).view(7, 1), None, 7))
        return student

    spec = modiff.QuantSpec(8, granularity="tensor", range="calibrated", timestep_buckets=7)
    weight = modiff.QuantSpec(8, granularity="channel")
    settings = modiff.QuantConfig(weight, spec, modiff.Modulation())
    plain, graphed = (calibrated(modiff.quantize(denoiser(), settings)) for _ in range(2))
    use_graphs(graphed, recorder=Again)
    expected, _ = run(plain)
    assert all(torch.equal(a, b) for a, b in zip(run(graphed)[0], expected, strict=True))
    assert len(Again.made) == 1


def test_operators_that_run_in_full_precision_are_recorded_too() -> None:
    from modiff.compiling.choose import use_float

    plain, graphed = pair()
    for student in (plain, graphed):
        use_float(student, ["conv_in"])
    expected, counts = run(plain)
    found, ours = run(graphed)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (ours.total, ours.quantized) == (counts.total, counts.quantized)
    assert [each.replays for each in Again.made] == [7 - 1 - WARM_UPS]


def test_too_many_shapes_run_as_they_are(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("modiff.compiling.graphs.RECORDINGS", 1)
    plain, graphed = pair()
    for batch in (2, 3):
        expected, _ = run(plain, 0, batch=batch)
        assert all(torch.equal(a, b) for a, b in zip(run(graphed, 0, batch=batch)[0], expected, strict=True))
    assert len(Again.made) == 1
    assert caplog.text.count("this one has other shapes or numbers") == 1


def test_it_can_be_undone_and_needs_a_gpu() -> None:
    plain, graphed = pair()
    run(graphed)
    uncompile(graphed)
    expected, _ = run(plain, 1)
    assert all(torch.equal(a, b) for a, b in zip(run(graphed, 1)[0], expected, strict=True))
    with pytest.raises(ConfigError, match="CUDA graphs need a CUDA device, and the student is on cpu"):
        use_graphs(graphed)
    with modiff.trajectory(plain), pytest.raises(TrajectoryError, match="cannot be recorded inside a trajectory"):
        use_graphs(plain, recorder=Again)


def test_a_measured_choice_is_timed_eagerly_and_then_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded evaluation passes no clock, and a CUDA graph may not wait for its device while it is recorded."""
    from modiff.compiling import choose

    seen: list[tuple[str, bool]] = []

    def clock(run: Any) -> Any:
        seen.append(("device", in_graph()))
        found = run()
        return found, 1.0 if len(Again.made) == 0 and not operator.in_float else 2.0

    monkeypatch.setattr(choose, "device_clock", clock)
    plain, graphed = pair()
    operator = operators(graphed)["conv_in"]
    state_of(graphed).listeners.append(choose.Measured(graphed, choose.chains_of(graphed, [])))
    expected, _ = run(plain)
    found, counts = run(graphed)
    assert (counts.total, counts.quantized) == (7, 6)
    assert len(seen) == 2 * (1 + choose.EVALUATIONS) * len(operators(graphed)) - len(operators(graphed)) * 2
    assert not any(inside for _, inside in seen)
    assert choose.in_float(graphed) == ()  # integers took half as long
    assert [recorder.replays for recorder in Again.made] == [7 - 1 - WARM_UPS]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    choose.use_float(graphed, ["conv_in"])
    others, _ = run(graphed)
    assert len(Again.made) == 2  # what was recorded with another choice does not fit
    assert not torch.equal(others[-1], found[-1])
