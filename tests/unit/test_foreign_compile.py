"""``torch.compile`` of a plain student by somebody else: no ``modiff.compile``, but the same numbers and counts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import modiff

X = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))


def student(name: str) -> nn.Module:
    torch.manual_seed(0)
    return modiff.quantize(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)), name)


def run(model: nn.Module, called: nn.Module) -> tuple[list[torch.Tensor], int, int]:
    with modiff.trajectory(model) as counts:
        outputs = [called(X * (1 - 0.1 * i)) for i in range(3)]
    return outputs, counts.total, counts.quantized


@pytest.mark.parametrize("name", ["w8a8-ptq", "w4a4-ptq"])
@pytest.mark.parametrize("eager_first", [False, True])
def test_counts_and_numbers(name, eager_first) -> None:
    expected, total, quantized = run(reference := student(name), reference)
    torch._dynamo.reset()
    model = student(name)
    if eager_first:
        run(model, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo, about Python that it does not trace
        found = run(model, torch.compile(model, backend="eager"))
    assert found[1:] == (total, quantized)
    for one, other in zip(found[0], expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
