"""Linear layers of one's own: listed where they are not quantized, quantized once an adapter is registered."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modiff
from modiff.errors import ConfigError
from modiff.operators import adapters
from modiff.operators.adapters import LinearAdapter, register_adapter


class Scaled(nn.Module):
    """Equalized learning rate: the weight is scaled when it is used."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, wide
        self.weight = nn.Parameter(torch.randn(wide, 8, generator=torch.Generator().manual_seed(0)) * 0.3)
        self.bias = nn.Parameter(torch.zeros(wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Scaled(), nn.LayerNorm(16))


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_a_layer_that_calls_linear_itself_is_listed_and_its_share_warned_of(caplog) -> None:
    student = modiff.quantize(model(), "w8a8-ptq")
    rows = {row.name: row for row in modiff.describe(student)}
    assert set(rows) == {"0", "1"}
    assert rows["1"].skipped == "it calls linear itself; register an adapter for it (docs/models.md)"
    with caplog.at_level(logging.WARNING, "modiff"), modiff.trajectory(student):
        student(X)
    assert "67 % of the multiply-accumulates of this student stay in full precision" in caplog.text
    assert "'1' (67%)" in caplog.text


class ScaledAdapter(LinearAdapter):
    types = (Scaled,)


def test_a_registered_adapter_quantizes_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    register_adapter(ScaledAdapter())
    for name in ("w8a8-modiff", "w8a8-ptq"):
        student = modiff.quantize(model(), name)
        assert [row.skipped for row in modiff.describe(student)] == [None, None]
        with modiff.trajectory(student):
            outputs = [student(X), student(X * 0.9)]
        assert (outputs[1] - model()(X * 0.9)).norm() / outputs[1].norm() < 0.03
        modiff.save(student, tmp_path / name)
        loaded = modiff.load(tmp_path / name, model())
        with modiff.trajectory(loaded):
            assert torch.equal(loaded(X), outputs[0])


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(ConfigError, match="is no adapter; give an object of a subclass of OperatorAdapter"):
        register_adapter(Scaled)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe, path: modiff.save(pipe, path),
        lambda pipe, path: modiff.describe(pipe),
        lambda pipe, path: modiff.compile(pipe),
        lambda pipe, path: modiff.restore(pipe),
        lambda pipe, path: modiff.load(path, pipe),
        lambda pipe, path: modiff.cost(pipe, X),
        lambda pipe, path: modiff.quantize(pipe, "w8a8-ptq"),
        lambda pipe, path: modiff.trajectory(pipe).__enter__(),
    ],
)
def test_a_pipeline_in_the_place_of_its_denoiser(call, tmp_path) -> None:
    class Pipe:
        components = {"vae": nn.Linear(1, 1), "unet": model(), "scheduler": object()}  # noqa: RUF012

    with pytest.raises(ConfigError, match=r"A Pipe is a pipeline\. Give its denoiser: pipe\.unet\."):
        call(Pipe(), tmp_path / "x")
    with pytest.raises(ConfigError, match="A int is no module. Give a denoiser"):
        call(5, tmp_path / "x")
