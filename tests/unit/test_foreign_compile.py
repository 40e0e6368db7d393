"""``torch.compile`` of a student by somebody else: no ``modiff.compile``, but the same numbers and counts."""

from __future__ import annotations

import logging
import warnings

import pipelines
import pytest
import torch
from torch import nn

import modiff
from modiff import QuantConfig
from modiff.config.schedule import ReuseSchedule
from modiff.errors import ConfigError, TrajectoryError

X = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
MODULATED, PLAIN = "w8a4-modiff", "w8a8-ptq"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(nn.functional.gelu(self.norm(self.a(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.last = nn.Linear(16, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + t
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def torch_compile(target, **options):
    return torch.compile(target, backend="eager", **options)


def wrapped(model: nn.Module, quantize) -> nn.Module:
    quantize(model)
    return torch_compile(model)


def wrapped_before(model: nn.Module, quantize) -> nn.Module:
    compiled = torch_compile(model)
    quantize(model)
    return compiled


def used_before(model: nn.Module, quantize) -> nn.Module:
    compiled = torch_compile(model)
    with torch.no_grad():
        compiled(X, torch.tensor(1.0))
    quantize(model)
    return compiled


def in_place(model: nn.Module, quantize) -> nn.Module:
    quantize(model)
    model.compile(backend="eager")
    return model


def in_place_before(model: nn.Module, quantize) -> nn.Module:
    model.compile(backend="eager")
    return quantize(model)


def block(model: nn.Module, quantize) -> nn.Module:
    quantize(model)
    model.blocks[0].compile(backend="eager")
    return model


def block_before(model: nn.Module, quantize) -> nn.Module:
    model.blocks[0].compile(backend="eager")
    return quantize(model)


def block_wrapped_before(model: nn.Module, quantize) -> nn.Module:
    model.blocks[0] = torch_compile(model.blocks[0])
    return quantize(model)


def operator(model: nn.Module, quantize) -> nn.Module:
    quantize(model)
    model.first.compile(backend="eager")
    return model


def forward(model: nn.Module, quantize) -> nn.Module:
    quantize(model)
    model.forward = torch_compile(model.forward)
    return model


def step_of_a_sampler(model: nn.Module, quantize):
    quantize(model)
    return torch_compile(lambda x, t: model(x, t) * 1.0)


def stages_before(model: nn.Module, quantize) -> nn.Module:
    return torch_compile(modiff.compile(quantize(model), mode="stages"))


WAYS = (
    wrapped,
    wrapped_before,
    used_before,
    in_place,
    in_place_before,
    block,
    block_before,
    block_wrapped_before,
    operator,
    forward,
    step_of_a_sampler,
)


@pytest.fixture(autouse=True)
def quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dynamo, about Python that it does not trace
        yield
    torch._dynamo.reset()


def run(model: nn.Module, called, evaluations: int = 4) -> tuple[list[torch.Tensor], int, int]:
    with modiff.trajectory(model) as counts:
        outputs = [called(X * (1 - 0.1 * i), torch.tensor(float(i))) for i in range(evaluations)]
    return outputs, counts.total, counts.quantized


def check(way, config) -> None:
    expected = run(reference := modiff.quantize(Net(), config), reference)
    model = Net()
    called = way(model, lambda net: modiff.quantize(net, config))
    student = model if hasattr(model, "_modiff_state") else called
    for _ in range(2):
        outputs, *counts = run(student, called)
        assert tuple(counts) == expected[1:]
        assert all(torch.equal(one, other) for one, other in zip(outputs, expected[0], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_modulated_student_keeps_numbers_and_counts(way) -> None:
    check(way, MODULATED)


@pytest.mark.parametrize("way", [wrapped, used_before, in_place_before, block, operator])
@pytest.mark.parametrize("config", [PLAIN, "w4a4-ptq-paper"])
def test_a_plain_student_keeps_numbers_and_counts(way, config) -> None:
    check(way, config)


def test_a_student_with_a_reuse_schedule_keeps_them() -> None:
    base = QuantConfig.preset(MODULATED)
    schedule = ReuseSchedule(every=2, blocks=("blocks.*",))
    config = QuantConfig(base.weight, base.activation, base.modulation, schedule=schedule)
    check(wrapped, config)
    student = modiff.quantize(Net(), config)
    with modiff.trajectory(student) as counts:
        compiled = torch_compile(student)
        for i in range(4):
            compiled(X, torch.tensor(float(i)))
    assert counts.reused == 1  # extrapolation needs two evaluations first


@pytest.mark.parametrize(
    "mode", ["stages", pytest.param("blocks", marks=pytest.mark.slow), pytest.param("whole", marks=pytest.mark.slow)]
)
def test_torch_compile_around_a_student_that_modiff_compiled(mode) -> None:
    expected = run(reference := modiff.quantize(Net(), MODULATED), reference)
    student = modiff.compile(modiff.quantize(Net(), MODULATED), mode=mode)
    outputs, *counts = run(student, torch_compile(student))
    assert tuple(counts) == expected[1:]
    for one, other in zip(outputs, expected[0], strict=True):
        assert (one - other).norm() / other.norm() < 0.02  # single codes may differ by one


def test_one_line_says_that_little_is_gained(caplog) -> None:
    student = modiff.quantize(Net(), MODULATED)
    with caplog.at_level(logging.WARNING, "modiff"):
        run(student, student)
        assert not caplog.records
        compiled = torch_compile(student)
        run(student, compiled)
        run(student, compiled)
    assert len(caplog.records) == 1
    assert "Its operators run outside of those graphs" in caplog.text
    assert "Use modiff.compile(student)" in caplog.text


def test_one_graph_for_all_is_refused_with_the_fix() -> None:
    student = modiff.quantize(Net(), MODULATED)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"modiff\.compile\(student\)"):
        run(student, torch_compile(student, fullgraph=True))


def test_a_module_that_is_wrapped_afterwards_is_refused_with_the_fix() -> None:
    student = modiff.quantize(Net(), MODULATED)
    student.blocks[1] = torch_compile(student.blocks[1])
    with pytest.raises(
        TrajectoryError, match=r"'blocks.1' of the student was wrapped by torch.compile.*modiff.compile"
    ):
        run(student, student)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("how", ["wrapped", "in place", "block"])
def test_a_pipelines_denoiser_is_refused_with_the_fix(before, how) -> None:
    pipe, arguments = pipelines.build(pipelines.stable_diffusion)

    def compile_() -> None:
        if how == "wrapped":
            pipe.unet = torch_compile(pipe.unet)
        else:
            (pipe.unet if how == "in place" else pipe.unet.mid_block).compile(backend="eager")

    if before:
        compile_()
        with pytest.raises(ConfigError, match=r"is compiled; .*modiff.compile\(pipe.unet\)"):
            modiff.quantize_pipeline(pipe, MODULATED)
    else:
        modiff.quantize_pipeline(pipe, MODULATED)
        compile_()
        with pytest.raises(ConfigError, match=r"is compiled; .*modiff.compile\(pipe.unet\)"):
            pipelines.draw(pipe, arguments)
