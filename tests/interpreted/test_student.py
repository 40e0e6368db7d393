"""A tiny student end to end on the Triton kernels, through the interpreter, on tensors of the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import modiff
from modiff.errors import ConfigError
from modiff.kernels.backend import BACKENDS
from modiff.student.describe import Description
from modiff.student.swap import operators

IMAGE = (2, 16, 6, 6)


class Denoiser(nn.Module):
    """A residual block with a time embedding, a strided convolution, attention's Linears, and what does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(16, 32, 3, padding=1)
        self.time = nn.Linear(16, 32)
        self.norm = nn.GroupNorm(4, 32)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.query, self.value = nn.Linear(32, 32), nn.Linear(32, 32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.conv_out = nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time(t)[:, :, None, None]
        h = self.down(nn.functional.silu(self.norm(h)))
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.query(tokens) * self.value(tokens)
        h = self.grouped(tokens.transpose(1, 2).reshape(h.shape))
        return self.conv_out(h)


def student_of(backend: str, rules: tuple[modiff.Rule, ...] = (), **modulation: object) -> nn.Module:
    torch.manual_seed(0)
    weight, activation = modiff.QuantSpec(8, granularity="channel"), modiff.QuantSpec(6, granularity="sample")
    settings = modiff.QuantConfig(weight, activation, modiff.Modulation(**modulation))
    return modiff.quantize(Denoiser().eval().requires_grad_(False), replace(settings, rules=rules, backend=backend))


def simulated(kept: str, **modulation: object) -> nn.Module:
    """A simulated student that keeps â as asked in the operators that kernels compute, and in float32 in the others."""
    wide, asked = (modiff.Modulation(**{**modulation, "reconstruction_dtype": d}) for d in ("float32", kept))
    rules = tuple(modiff.Rule(name, modulation=wide) for name in ("grouped", "conv_out"))
    return student_of("simulate", rules, **vars(asked))


def images(student: nn.Module) -> list[Tensor]:
    generator, found = torch.Generator().manual_seed(1), []
    x, t = torch.randn(IMAGE, generator=generator), torch.randn(2, 16, generator=generator)
    with modiff.trajectory(student) as run:
        for _ in range(4):
            found.append(student(x, t))
            x, t = x + 0.1 * torch.randn(IMAGE, generator=generator), t + 0.1 * torch.randn(2, 16, generator=generator)
    assert run.quantized == 3 + (run.total - run.quantized == 0)
    return found


@pytest.mark.parametrize(
    ("modulation", "kept"),
    [
        pytest.param({}, "int16", id="default"),
        pytest.param({"warmup": "refine"}, "int16", id="refine", marks=pytest.mark.slow),
        pytest.param({"reconstruction_dtype": "float32"}, "float32", id="float32"),
    ],
)
def test_a_trajectory_is_the_simulated_one(modulation: dict[str, object], kept: str) -> None:
    """Sums are exact, so that only the float32 rounding of scales times sums differs."""
    found, expected = images(student_of("auto", **modulation)), images(simulated(kept, **modulation))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[-1], found[-2])


NO_INT16 = {"time", "grouped", "conv_out"}
"""Operators that read a vector, or that no kernel computes."""


def test_the_reconstruction_is_int16_where_the_kernels_run_and_the_invariant_holds() -> None:
    student = student_of("auto")
    kept = {row.name: row.reconstruction for row in modiff.describe(student)}
    assert {name for name, text in kept.items() if not text} == NO_INT16 - {"time"}
    assert kept["down"] == kept["time"] == "int16 unless a sample is one vector"
    x, t = torch.randn(IMAGE), torch.randn(2, 16)
    with modiff.trajectory(student) as run:
        for n in range(1, 6):
            student(x + 0.1 * n * torch.randn(IMAGE), t + 0.1 * n)
            for name, operator in operators(student).items():
                cache = run.caches[name][0]
                assert cache.a_hat.dtype == (torch.float32 if name in NO_INT16 else torch.int16)
                weight, bias = operator.quantized_weight().double(), operator.bias.double()
                wanted = operator.adapter.apply(operator.module, cache.reconstruction().double(), weight, bias)
                error = (cache.o_hat.double() - wanted).norm() / wanted.norm()
                assert error <= 4 * torch.finfo(torch.float32).eps * n**0.5  # 2: sums of up to 288 terms in float32
    assert {row.name for row in modiff.describe(student) if row.reconstruction == "int16"} == set(kept) - NO_INT16
    assert "compensated, full warm-up, â in int16  triton" in str(modiff.describe(student))


def test_a_reconstruction_that_was_asked_for_stays_as_it_was_asked_for() -> None:
    for backend, dtype in (("auto", "float32"), ("simulate", None), ("simulate", "int16")):
        student = student_of(backend, reconstruction_dtype=dtype)
        with modiff.trajectory(student) as run:
            student(torch.randn(IMAGE), torch.randn(2, 16))
            kept = {name: caches[0].a_hat.dtype for name, caches in run.caches.items()}
            student(torch.randn(IMAGE), torch.randn(2, 16))
        assert kept["down"] == (torch.int16 if dtype == "int16" else torch.float32)
        found = {row.name: row.reconstruction for row in modiff.describe(student)}
        assert found["down"] == ("int16" if dtype == "int16" else "")


def test_the_description_says_why_an_operator_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BACKENDS, "onednn")  # there is none on a GPU
    found: Description = modiff.describe(student_of("auto"))
    backends = {row.name: row.backend for row in found}
    for name in ("conv_in", "time", "down", "query", "value"):
        assert backends[name] == "triton"
    assert backends["grouped"] == "simulate (it has 4 groups, and the Triton kernels have no grouped convolution)"
    assert backends["conv_out"] == "simulate (its 3 output channels are not a multiple of 16)"


def test_asked_for_by_name_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'triton' cannot run operator 'grouped' exactly: it has 4 groups"):
        student_of("triton")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::DeprecationWarning")
def test_a_graph_holds_the_kernels_as_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as a whole, without inductor's code: the fakes and what each operator writes to are as they say."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = images(student_of("auto", warmup="full"))
    student = student_of("auto", warmup="full")
    found = images(modiff.compile(student, "whole"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
