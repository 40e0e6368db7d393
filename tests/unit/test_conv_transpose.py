"""Transposed convolutions are operators like others: every geometry, execution, cost, calibration, files."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import modiff
from modiff import QuantConfig, QuantSpec
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.loop.moments import input_vectors
from modiff.kernels.float import linear_map
from modiff.kernels.transposed import as_convolution, canonical, flipped, native, stuffed
from modiff.operators.adapters import ConvTransposeAdapter

CLASSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
GEOMETRIES = [
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "bias": False},
    {"kernel_size": 1, "stride": 3, "padding": 0, "output_padding": 2},
    {"kernel_size": 2, "stride": 2, "padding": 3},
]
ADAPTER = ConvTransposeAdapter()


class Model(nn.Module):
    """A convolution and a transposed one; the time step shifts the input."""

    def __init__(self, rank: int, geometry: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.a = conv(4, 4, 3, padding=1)
        self.up = CLASSES[rank - 1](4, 6, **geometry)

    def forward(self, x: torch.Tensor, t: int = 0) -> torch.Tensor:
        return self.up(torch.tanh(self.a(x) + 0.1 * t))


def image(rank: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, *[6] * rank, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_as_a_convolution_of_a_stuffed_input(rank, geometry) -> None:
    module = CLASSES[rank - 1](4, 6, **geometry).double()
    x = image(rank).double()
    shape, weight, expected = ADAPTER.shape(module), canonical(module.weight, module.groups), module(x)
    assert torch.equal(native(weight, module.groups), module.weight)
    assert torch.equal(linear_map(x, weight, module.bias, shape), expected)
    assert torch.allclose(linear_map(stuffed(x, shape), flipped(weight), module.bias, as_convolution(shape)), expected)
    assert ADAPTER.macs(module, expected) == x.shape[0] * x[0, 0].numel() * module.weight.numel()
    vectors = input_vectors(module, "conv", x, torch.arange(expected[:, 0].numel()))
    grouped = weight.reshape(module.groups, -1, weight[0].numel())
    found = torch.einsum("ngk,gok->ngo", vectors, grouped).flatten(1)
    bias = 0 if module.bias is None else module.bias
    assert torch.allclose(found + bias, expected.movedim(1, -1).reshape(-1, 6))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES[:3])
@pytest.mark.parametrize("name", ["w8a8-modiff", "w8a7-ptq-paper", "w4a4-modiff-paper"])
def test_executions_agree_and_the_invariant_holds(rank, geometry, name) -> None:
    preset = QuantConfig.preset(name)
    activation = QuantSpec(preset.activation.bits, "sample")
    outputs = {}
    for backend in ("simulate", "auto"):
        config = QuantConfig(QuantSpec(preset.weight.bits, "channel"), activation, preset.modulation, backend=backend)
        student = modiff.quantize(Model(rank, geometry), config)
        rows = {row.name: row for row in modiff.describe(student)}
        assert rows["up"].skipped is None
        if backend == "auto" and rank < 3:
            assert rows["up"].backend == rows["a"].backend
        with modiff.trajectory(student) as run, torch.no_grad():
            outputs[backend] = [student(image(rank) * (1 - 0.1 * i), i) for i in range(4)]
            if preset.modulation:
                cache = run.caches["up"][0]
                exact = student.up.product(cache.reconstruction(), with_bias=True)
                assert torch.allclose(cache.o_hat, exact, atol=1e-5)
    for one, other in zip(outputs["simulate"], outputs["auto"], strict=True):
        assert torch.allclose(one, other, atol=2e-5)
    teacher = Model(rank, geometry)
    expected = teacher(image(rank) * 0.7, 3)
    assert (outputs["auto"][-1] - expected).norm() / expected.norm() < (0.03 if "w8" in name else 0.25)


@pytest.mark.parametrize("keep", [True, False])
def test_files_and_the_way_back(tmp_path, keep) -> None:
    student = modiff.quantize(Model(2, GEOMETRIES[1]), QuantConfig.preset("w4a4-modiff-paper"), keep_teacher=keep)
    modiff.save(student, tmp_path / "s")
    other = Model(2, GEOMETRIES[1])
    nn.init.normal_(other.up.weight)
    loaded = modiff.load(tmp_path / "s", other, keep_teacher=keep)
    for one, two in zip(_run(student), _run(loaded), strict=True):
        assert torch.equal(one, two)
    teacher = Model(2, GEOMETRIES[1])
    restored = modiff.restore(student) if keep else modiff.restore(student, teacher=teacher)
    assert torch.equal(restored(image(2)), teacher(image(2)))


def _run(student: nn.Module) -> list[torch.Tensor]:
    with modiff.trajectory(student):
        return [student(image(2) * (1 - 0.1 * i), i) for i in range(3)]


@pytest.mark.parametrize("method", ["nearest", "lp", "gptq", "adaround"])
def test_calibration(method) -> None:
    teacher = Model(2, GEOMETRIES[1]).eval()
    config = QuantConfig(QuantSpec(3, "channel"), QuantSpec(8, "sample"), modiff.Modulation())

    def run(denoiser: nn.Module) -> None:
        with modiff.trajectory(denoiser):
            for i in range(3):
                denoiser(image(2, 8) * (1 - 0.1 * i), i)

    settings = CalibrationSettings(iterations=30, positions=2000, samples=16, evaluations=3)
    student = calibrate(teacher, config, run, method=method, settings=settings)
    with torch.no_grad(), modiff.trajectory(student):
        out = student(image(2), 0)
    expected = Model(2, GEOMETRIES[1])(image(2), 0)
    error = (out - expected).norm() / expected.norm()
    nearest = modiff.quantize(Model(2, GEOMETRIES[1]), config)
    with torch.no_grad(), modiff.trajectory(nearest):
        plain = (nearest(image(2), 0) - expected).norm() / expected.norm()
    assert error <= plain * (1.0001 if method in ("nearest", "lp") else 0.98) or method == "lp"


def test_cost_counts_them_and_says_what_stays_in_full_precision(caplog) -> None:
    model = nn.Sequential(Model(2, GEOMETRIES[0]), nn.Conv2d(6, 6, 3))
    student = modiff.quantize(model, QuantConfig.preset("w4a8-ptq-paper"))
    cost = modiff.cost(student, image(2))
    assert {row.name for row in cost.operators} == {"0.a", "0.up", "1"}
    assert cost.full_precision_share == 0
    assert "0.0% of the multiply-accumulates in full precision" in str(cost)
    skipped = modiff.cost(modiff.restore(student), image(2))
    assert skipped.full_precision_share == 1


class Scaled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        return super().forward(2 * input)


def test_a_large_share_in_full_precision_is_warned_of_once(caplog) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Scaled(4, 4, 3, padding=1))
    student = modiff.quantize(model, QuantConfig.preset("w8a8-modiff"))
    with caplog.at_level(logging.WARNING, "modiff"), modiff.trajectory(student):
        for i in range(3):
            student(image(2) * (1 - 0.1 * i))
    modiff.cost(student, image(2))
    assert [record.message for record in caplog.records] == [
        "90 % of the multiply-accumulates of this student stay in full precision, because modiff cannot quantize these "
        "modules: '1' (90%). modiff.describe(student) says why."
    ]
    assert modiff.cost(student, image(2)).full_precision_share == pytest.approx(0.9)
