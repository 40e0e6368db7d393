"""Ranges of residuals need not contain 0 where sets are small and codes few: zero needs no code there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.operators.reference import ReferenceOperator


def student(spec: QuantSpec, **modulation) -> nn.Module:
    torch.manual_seed(0)
    return modiff.quantize(
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1)), QuantConfig(None, spec, Modulation(**modulation))
    )


def inputs(n: int = 4, size: float = 1.0) -> list[torch.Tensor]:
    """Every channel rises, each by another amount: residuals on one side of 0."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 6, 6, generator=g)
    rise = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 4, 1, 1)
    return [x + size * i * (rise + 0.05 * torch.rand(x.shape, generator=g)) for i in range(n)]


def errors(spec: QuantSpec) -> list[float]:
    model = student(spec)
    with modiff.trajectory(model) as run:
        found = []
        for x in inputs():
            model(x)
            found.append(float((run.caches["0"][0].reconstruction() - x).norm() / x.norm()))
    return found


def test_one_sided_residuals_lose_far_less() -> None:
    free = errors(QuantSpec(3, "sample_channel", symmetric=False))
    widened = errors(QuantSpec(3, "sample", symmetric=False))
    assert max(free[1:]) < 0.002  # the width is .05 of the shift, in 7 steps
    assert min(widened[1:]) > 0.02


@pytest.mark.parametrize("granularity", ["channel", "sample_channel", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("warmup", ["full", "refine"])
def test_as_the_reference_has_it(granularity, bits, clip, warmup) -> None:
    size = {"group_size": 2} if granularity == "group" else {}
    spec = QuantSpec(bits, granularity, symmetric=False, clip=clip, **size)
    model = student(spec, warmup=warmup).double()  # float32 rounds some values to the other code
    reference = ReferenceOperator(model[0].module, None, spec, Modulation(warmup=warmup))
    with modiff.trajectory(model):
        for x in inputs():
            assert torch.allclose(model(x.double()), reference.evaluate(x), atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 5.3, -1e-20, 1e30])
def test_a_constant_residual_is_kept(value) -> None:
    model = student(QuantSpec(2, "sample_channel", symmetric=False))
    with modiff.trajectory(model) as run:
        model(torch.zeros(1, 4, 6, 6))
        model(torch.full((1, 4, 6, 6), value))
        found = run.caches["0"][0].reconstruction()
    assert torch.allclose(found, torch.full_like(found, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_int16_state(bits) -> None:
    spec = QuantSpec(bits, "sample_channel", symmetric=False)
    few = inputs(size=0.1)  # what int16 holds
    with modiff.trajectory(model := student(spec)):
        expected = [model(x) for x in few]
    with modiff.trajectory(model := student(spec, reconstruction_dtype="int16")):
        for x, other in zip(few, expected, strict=True):
            assert (model(x) - other).norm() / other.norm() < 0.01
