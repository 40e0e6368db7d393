"""Asymmetric 8-bit codes run in integers: zero points are corrected by ``z A(1)``, at padded borders too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.kernels.onednn import exact_8bit

pytestmark = pytest.mark.skipif(not exact_8bit(), reason="8-bit products are not exact on this CPU")

OPERATORS = {
    "linear": (lambda: nn.Linear(24, 16), (3, 24)),
    "tokens": (lambda: nn.Linear(24, 16), (3, 5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 16, 3, padding=1), (3, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 16, 3, padding=1), (3, 8, 7, 9)),
    "strided": (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=2), (3, 8, 9, 9)),
}


def student(make, backend: str, modulation: Modulation | None, granularity: str = "sample") -> nn.Module:
    torch.manual_seed(0)
    activation = QuantSpec(8, granularity, symmetric=False)
    return modiff.quantize(
        nn.Sequential(make()), QuantConfig(QuantSpec(8, "channel"), activation, modulation, backend=backend)
    )


def run(model: nn.Module, shape: tuple[int, ...]) -> list[torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).abs() + torch.linspace(0.1, 2, shape[-1])
    with modiff.trajectory(model):
        return [model(x * (1 - 0.05 * i)) for i in range(4)]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("modulation", [None, Modulation(), Modulation(reconstruction_dtype="int16")])
@pytest.mark.parametrize("granularity", ["sample", "tensor"])
def test_integers_agree_with_the_definition(name, modulation, granularity) -> None:
    make, shape = OPERATORS[name]
    integers, definition = (student(make, backend, modulation, granularity) for backend in ("onednn", "simulate"))
    assert [row.backend for row in modiff.describe(integers)] == ["onednn"]
    for one, other in zip(run(integers, shape), run(definition, shape), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=2e-5 * other.abs().max())


def test_both_arms_of_a_preset_run_alike() -> None:
    for name in ("w8a8-modiff", "w8a8-ptq"):
        model = modiff.quantize(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Linear(9, 4)), name)
        assert {row.backend for row in modiff.describe(model)} == {"onednn"}
