"""ô returned without a copy, and guarded against whoever writes to it: on the CPU, by a backend that returns it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import config, denoiser, noise
from torch import Tensor, nn

import modiff
from modiff.errors import TrajectoryError
from modiff.kernels.backend import BACKENDS
from modiff.kernels.float import FloatBackend
from modiff.trajectory.lending import Lent


class Returning(FloatBackend):
    """The definition, which returns ô itself as GPU kernels do, and reads half precision."""

    returns_state = True
    reads_half = True

    def advance(self, a, held, prepared, quantizer, o_hat):
        assert a.dtype in (torch.float32, torch.float16, torch.bfloat16)
        _, probe = super().advance(a.to(torch.float32), held, prepared, quantizer, o_hat)
        return o_hat, probe


@pytest.fixture
def returning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "simulate", Returning())


def outputs(model: nn.Module, inputs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    found = []
    with modiff.trajectory(model):
        for args in inputs:
            found.append(model(*args))
    return found


def student_of(teacher: nn.Module) -> nn.Module:
    return modiff.quantize(teacher, replace(config(), backend="simulate"))


def test_the_outputs_are_the_same_and_stay_as_they_were(returning: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that keeps the denoiser's outputs must not see them change."""
    student = student_of(denoiser())
    found = outputs(student, noise(5))
    monkeypatch.undo()
    expected = outputs(student_of(denoiser()), noise(5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_state_itself_is_returned(returning: None) -> None:
    student, seen = student_of(denoiser()), []
    student.conv_in.register_forward_hook(lambda _m, _a, output: seen.append(output.data_ptr()))
    with modiff.trajectory(student) as run:
        for args in noise(4):
            student(*args)
            caches = run.current.caches["conv_in"]
    assert seen[0] != caches[0].o_hat.data_ptr()
    assert seen[1:] == [caches[0].o_hat.data_ptr()] * 3


class InPlace(nn.Module):
    """A denoiser whose activation overwrites what a convolution returned, from some call on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.since, self.calls = since, 0
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.calls += 1
        return self.last(nn.functional.silu(h, inplace=self.calls > self.since))


@pytest.mark.parametrize("since", [0, 1])
def test_an_operator_whose_output_is_overwritten_returns_copies(
    since: int, returning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at the first evaluation, whose output is a copy always; later it is an error."""
    torch.manual_seed(0)
    teacher, inputs = InPlace(since).eval().requires_grad_(False), [x for x, _ in noise(5)]
    student = student_of(teacher)
    if since:
        message = "'first' was overwritten in place, for the first time in evaluation 1"
        with pytest.raises(TrajectoryError, match=message):
            outputs(student, [(x,) for x in inputs])
        return
    found = outputs(student, [(x,) for x in inputs])
    monkeypatch.undo()
    student.first.forget_executions()
    student.last.forget_executions()
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(student, [(x,) for x in inputs]), strict=True))


def test_half_precision_reaches_a_backend_that_reads_it(returning: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = noise(4)
    student = student_of(denoiser())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(student, inputs)
    monkeypatch.undo()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = outputs(student_of(denoiser()), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_the_memory_of_what_was_lent_is_not_kept() -> None:
    tensor = torch.zeros(1000)
    lent = Lent.of(tensor, is_state=True)
    assert lent is not None
    assert lent.counter.untyped_storage().nbytes() == 0
    assert not lent.written
    tensor[3:5].mul_(2)
    assert lent.written


def test_where_no_writes_are_counted_nothing_is_lent() -> None:
    with torch.inference_mode():
        assert Lent.of(torch.zeros(3), is_state=True) is None
