"""modiff.compile: the same outputs and errors, one graph for each shape, and no more."""

import copy
import dataclasses
import functools
import logging
import re

import pytest
import torch
from small_models import config, denoiser, noise, run
from torch import nn
from torch._dynamo.utils import counters

import modiff
from modiff.compiling import modes
from modiff.config.quant import Split
from modiff.errors import ConfigError, TrajectoryError
from modiff.kernels import compiled
from modiff.student import blocks
from modiff.student.swap import convert


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are captured, guarded and counted as ever, but run by PyTorch's eager kernels, which takes no time."""
    torch._dynamo.reset()
    counters.clear()
    compiled.compiled_function.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(modes, "_missing_compiler", lambda student: None)
    monkeypatch.setattr(compiled, "SMALL", 0)
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    compiled.compiled_function.cache_clear()


def close(found, expected):
    """Compiled code may round differently, so that single codes differ by one."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


class Blocks(nn.Module):
    """Two blocks of one class, and an operator outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return x + torch.softmax(self.to_q(x) @ self.to_k(x).mT, -1) @ self.to_v(x)


def tokens(evaluations, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(batch, 4, 6, generator=generator),) for _ in range(evaluations)]


@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
@pytest.mark.parametrize(
    "preset", ["w8a7-modiff-paper", "w8a4-modiff-paper", "w8a4-modiff", "w8a6-ptq-paper", "w8a8-ptq"]
)
def test_compiled_students_agree_with_eager_ones(graphs, mode, preset):
    expected, wanted = run(modiff.quantize(Blocks(), config(preset)), tokens(6))
    student = modiff.compile(modiff.quantize(Blocks(), config(preset)), mode)
    found, counts = run(student, tokens(6))
    close(found, expected)
    assert (counts.total, counts.quantized) == (wanted.total, wanted.quantized)
    # Asymmetric 8-bit codes keep their zero points, and their element-wise stage is not compiled by itself.
    assert graphs() > 0 or (mode, preset) == ("stages", "w8a8-ptq")
    again, _ = run(student, tokens(6))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


VARIANTS = [
    {"state_dtype": "float16", "reconstruction_dtype": "int16"},
    {"error_compensation": False},
    {"refresh_every": 3},
    {"warmup": "refine"},
]


@pytest.mark.parametrize("mode", ["stages", "whole"])
@pytest.mark.parametrize("modulation", VARIANTS)
def test_every_kind_of_modulation_compiles(graphs, mode, modulation):
    base = config("w8a6-modiff-paper", **modulation)
    expected, wanted = run(modiff.quantize(denoiser(), base), noise(7))
    found, counts = run(modiff.compile(modiff.quantize(denoiser(), base), mode), noise(7))
    close(found, expected)
    assert (counts.total, counts.quantized) == (wanted.total, wanted.quantized)


@pytest.mark.parametrize("mode", ["stages", "whole"])
@pytest.mark.parametrize("reconstruction_dtype", ["float32", "int16"])
def test_scales_in_powers_of_two_compile(graphs, mode, reconstruction_dtype):
    spec = modiff.QuantSpec(4, "sample_channel", symmetric=False, scales="power_of_two")
    modulation = modiff.Modulation(reconstruction_dtype=reconstruction_dtype)
    base = modiff.QuantConfig(modiff.QuantSpec(8, "channel"), spec, modulation)
    expected, _ = run(modiff.quantize(denoiser(), base), noise(4))
    found, _ = run(modiff.compile(modiff.quantize(denoiser(), base), mode), noise(4))
    close(found, expected)


@pytest.mark.parametrize("mode", ["stages", "whole"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "sample_channel", "group"])
def test_every_granularity_compiles(graphs, mode, granularity):
    size = 2 if granularity == "group" else None
    spec = modiff.QuantSpec(6, granularity, group_size=size)
    base = modiff.QuantConfig(modiff.QuantSpec(8, "channel"), spec, modiff.Modulation())
    expected, _ = run(modiff.quantize(denoiser(), base), noise(4))
    found, _ = run(modiff.compile(modiff.quantize(denoiser(), base), mode), noise(4))
    close(found, expected)


def rewritten(base):
    """Blocks of which one operator is in halves and one has migrated scales."""
    names = [f"blocks.{i}" for i in range(2)]
    splits = tuple(Split(f"{name}.to_q", 2) for name in names)
    smoothed = tuple(f"{name}.to_k" for name in names)
    divisors = {name: torch.tensor([0.5, 1.0, 2.0, 0.7, 1.5, 1.0]) for name in smoothed}
    return convert(Blocks(), dataclasses.replace(base, splits=splits, smoothed=smoothed), True, divisors=divisors)


@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
@pytest.mark.parametrize("preset", ["w8a7-modiff-paper", "w8a8-ptq"])
@pytest.mark.parametrize("backend", ["auto", "simulate"])
def test_rewritten_operators_compile_with_the_rest(graphs, mode, preset, backend):
    base = dataclasses.replace(config(preset), backend=backend)
    expected, wanted = run(rewritten(base), tokens(6))
    student = modiff.compile(rewritten(base), mode)
    found, counts = run(student, tokens(6))
    close(found, expected)
    assert (counts.total, counts.quantized) == (wanted.total, wanted.quantized)
    after, _ = graphs(), run(student, tokens(12))
    # Codes that keep their zero point are made outside of stages.
    eager = preset == "w8a8-ptq" and any(row.backend.startswith("onednn") for row in modiff.describe(student))
    assert (graphs(), after == 0) == (after, eager and mode == "stages")
    # Not the pairs of halves.
    assert mode != "blocks" or [type(m) for m in blocks.repeated_blocks(student)] == [Block, Block]
    if mode == "whole":  # the first evaluation is eager: of plain quantization it runs a stage, of MoDiff none
        assert after == (1 if eager or "modiff" in preset else 2)
    assert type((restored := modiff.restore(student)).blocks[0].to_q) is nn.Linear
    assert torch.equal(restored(*tokens(1)[0]), Blocks()(*tokens(1)[0]))


@pytest.mark.parametrize(("mode", "most"), [("whole", 1), ("blocks", 1)])
def test_one_graph_for_each_shape_and_no_more_over_a_trajectory(graphs, mode, most):
    model = Blocks()
    student = modiff.compile(modiff.quantize(model, config("w8a7-modiff-paper")), mode)
    run(student, tokens(3))
    after_three = graphs()
    run(student, tokens(50))
    assert graphs() == after_three
    assert not counters["recompiles"]
    if mode == "whole":
        assert after_three == most
    run(student, tokens(3, batch=3))
    assert (another := graphs()) > after_three
    run(student, tokens(50, batch=3))
    assert graphs() == another


def test_stages_compile_once_for_all_operators_and_shapes(graphs):
    student = modiff.compile(modiff.quantize(denoiser(), config("w8a7-modiff-paper")), "stages")
    run(student, noise(3))
    after_three = graphs()
    run(student, noise(50))
    assert graphs() == after_three
    larger = modiff.compile(modiff.quantize(denoiser(1), config("w8a5-modiff-paper")), "stages")
    run(larger, noise(3))
    run(larger, noise(50, batch=3))
    assert graphs() <= after_three + 2  # asymmetric codes: another way to a scale


@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
def test_misuse_raises_as_in_eager_mode(graphs, mode):
    student = modiff.compile(modiff.quantize(Blocks(), config("w8a7-modiff-paper")), mode)
    run(student, tokens(3))
    with pytest.raises(TrajectoryError, match="called outside a trajectory"):
        student(*tokens(1)[0])
    with modiff.trajectory(student):
        student(*tokens(1)[0])
        student(*tokens(2)[1])
        with pytest.raises(TrajectoryError, match=r"has shape \[3, 4, 6\] in evaluation 2, but"):
            student(*tokens(1, batch=3)[0])


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k = nn.Linear(6, 4), nn.Linear(5, 4)

    def forward(self, x, prompt):
        return self.to_q(x) @ self.to_k(prompt).mT


@pytest.mark.parametrize("mode", ["stages", "whole"])
def test_fixed_inputs_are_not_multiplied_again(graphs, mode):
    prompt = torch.randn(2, 3, 5)
    inputs = [(x, prompt) for (x,) in tokens(5)]
    expected, _ = run(modiff.quantize(Prompted(), config("w8a7-modiff-paper")), inputs)
    student = modiff.compile(modiff.quantize(Prompted(), config("w8a7-modiff-paper")), mode)
    found, counts = run(student, inputs)
    close(found, expected)
    assert counts.constant == {"to_k"}
    assert {row.name for row in modiff.describe(student) if row.constant} == {"to_k"}
    changing = [(x, prompt + i) for i, (x,) in enumerate(tokens(5))]
    expected, _ = run(modiff.quantize(Prompted(), config("w8a7-modiff-paper")), changing)
    found, counts = run(student, changing)
    close(found, expected)
    assert counts.constant == set()


def test_calibrated_ranges_follow_the_time_step_inside_a_graph(graphs):
    from modiff.quantizers.calibrated import CalibratedRange

    spec = modiff.QuantSpec(6, "tensor", range="calibrated", timestep_buckets=3)
    base = modiff.QuantConfig(modiff.QuantSpec(8, "channel"), spec, modiff.Modulation())
    students = [modiff.quantize(Blocks(), base) for _ in range(2)]
    for student in students:
        for operator in (m for m in student.modules() if hasattr(m, "use_range")):
            operator.use_range(CalibratedRange(torch.tensor([[0.2], [0.1], [0.05]]), None, length=6))
    expected, _ = run(students[0], tokens(6))
    compiled = modiff.compile(students[1], "whole")
    found, _ = run(compiled, tokens(6))
    close(found, expected)
    before = graphs()
    run(compiled, tokens(6))
    assert graphs() == before
    with pytest.raises(TrajectoryError, match="The trajectory is longer than calibrated"):
        run(compiled, tokens(7))


@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
def test_restoring_and_copying_leave_no_graph_behind(graphs, mode):
    teacher = Blocks()
    expected = teacher(*tokens(1)[0])
    student = modiff.compile(modiff.quantize(teacher, config("w8a7-modiff-paper")), mode)
    wanted, _ = run(student, tokens(3))
    twin = copy.deepcopy(student)
    found, _ = run(twin, tokens(3))
    close(found, wanted)
    assert twin.blocks[0].to_q is not student.blocks[0].to_q
    restored = modiff.restore(student)
    assert torch.equal(restored(*tokens(1)[0]), expected)
    assert "forward" not in vars(restored)
    assert all("forward" not in vars(block) for block in restored.blocks)


def test_a_denoiser_that_is_no_single_graph_is_compiled_in_parts_and_says_so(graphs, caplog):
    class Breaking(Blocks):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    expected, _ = run(modiff.quantize(Breaking(), config("w8a7-modiff-paper")), tokens(4))
    with caplog.at_level(logging.WARNING, logger="modiff"):
        found, counts = run(
            modiff.compile(modiff.quantize(Breaking(), config("w8a7-modiff-paper")), "whole"), tokens(4)
        )
    close(found, expected)
    assert counts.quantized == 3
    assert [r.message for r in caplog.records if "not one graph" in r.message]


def test_without_a_compiler_one_line_says_so_and_the_student_runs_eagerly(monkeypatch, caplog):
    monkeypatch.setattr(modes, "_missing_compiler", lambda student: "no C++ compiler is installed")
    student = modiff.quantize(denoiser(), config("w8a7-modiff-paper"))
    expected, _ = run(student, noise(3))
    with caplog.at_level(logging.WARNING, logger="modiff"):
        assert modiff.compile(student, "stages") is student
    assert [r.message for r in caplog.records] == [
        "modiff.compile: no C++ compiler is installed, so the student runs eagerly. Install one, such as g++."
    ]
    found, _ = run(student, noise(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_search_for_a_compiler_finds_none_where_there_is_none(monkeypatch):
    monkeypatch.setenv("CXX", "")
    # Not by monkeypatch: that would hide the setting from all tests that follow.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert modes._missing_compiler(denoiser()) == "no C++ compiler is installed"
    assert torch._inductor.config.cpp.cxx


def test_wrong_modes_are_refused():
    student = modiff.quantize(denoiser(), config("w8a7-modiff-paper"))
    with pytest.raises(ConfigError, match=re.escape("mode is 'fast'; allowed are auto, fused, stages, blocks, whole.")):
        modiff.compile(student, "fast")
    with pytest.raises(ConfigError, match="Denoiser has no repeated blocks"):
        modiff.compile(student, "blocks")
    with pytest.raises(TrajectoryError, match="not a student"):
        modiff.compile(denoiser())
    with modiff.trajectory(student), pytest.raises(TrajectoryError, match="cannot be compiled inside a trajectory"):
        modiff.compile(student)


def test_uncompile_puts_the_eager_student_back(graphs):
    student = modiff.quantize(Blocks(), config("w8a7-modiff-paper"))
    expected, _ = run(student, tokens(3))
    modes.uncompile(modiff.compile(student, "whole"))
    found, _ = run(student, tokens(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
def test_the_real_compiler(mode, monkeypatch):
    monkeypatch.setattr(compiled, "SMALL", 0)
    torch._dynamo.reset()
    compiled.compiled_function.cache_clear()
    expected, _ = run(modiff.quantize(Blocks(), config("w8a7-modiff-paper")), tokens(5))
    found, counts = run(modiff.compile(modiff.quantize(Blocks(), config("w8a7-modiff-paper")), mode), tokens(5))
    close(found, expected)
    assert (counts.total, counts.quantized) == (5, 4)


def test_small_tensors_go_through_eager_stages(graphs, monkeypatch):
    monkeypatch.setattr(compiled, "SMALL", 2 * 4 * 6 + 1)
    expected, _ = run(modiff.quantize(Blocks(), config("w8a7-modiff-paper")), tokens(3))
    found, _ = run(modiff.compile(modiff.quantize(Blocks(), config("w8a7-modiff-paper")), "stages"), tokens(3))
    assert graphs() == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Offload:
    """As accelerate's ``CpuOffload``: stands for the denoiser's forward, and moves it there."""

    def __init__(self, module, moves):
        self.module, self.moves, self.calls = module, moves, 0
        module._hf_hook, module._old_forward, module.forward = self, module.forward, self

    def __call__(self, *args, **kwargs):
        if self.calls in self.moves:
            self.module.to("cpu:0")  # other tensors: PyTorch copies from "cpu"
        self.calls += 1
        return self.module._old_forward(*args, **kwargs)


@pytest.mark.parametrize("mode", ["stages", "blocks", "whole"])
@pytest.mark.parametrize("moves", [(0,), (0, 2, 3)])
def test_offloading_around_a_compiled_denoiser(graphs, mode, moves):
    """Moved before the first evaluation, as for most pipelines; or also later, where another model had its turn."""
    pipelines = pytest.importorskip("pipelines")
    pipe, arguments = pipelines.build(pipelines.dit)
    teacher = pipelines.draw(pipe, arguments)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    eager = pipelines.draw(pipe, arguments)
    hook = Offload(modiff.compile(pipe.transformer, mode), moves)
    images = pipelines.draw(pipe, arguments)
    counts = pipe.trajectories["transformer"]
    assert (counts.total, counts.quantized, hook.calls) == (4, 3, 4)
    assert graphs() > 0
    assert (images - eager).norm() < 0.02 * eager.norm()
    modiff.restore_pipeline(pipe)
    assert torch.equal(pipelines.draw(pipe, arguments), teacher)
    assert hook.calls == 8  # still offloaded


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_a_denoiser_whose_forward_is_an_offloading_hook_is_not_compiled(graphs, mode):
    student = modiff.quantize(Blocks(), config())
    for module in (student, *student.blocks):
        Offload(module, ())
    before = student.forward
    with pytest.raises(ConfigError, match=f"offloaded by accelerate, .* mode '{mode}' would take its place. Compile"):
        modiff.compile(student, mode)
    assert student.forward is before
    modiff.compile(student, "stages")


def test_the_denoiser_of_a_pipeline_is_compiled_after_it_was_quantized(graphs):
    pipelines = pytest.importorskip("pipelines")
    pipe, arguments = pipelines.build(pipelines.dit)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    eager = pipelines.draw(pipe, arguments)
    modiff.compile(pipe.transformer, "stages")
    images = pipelines.draw(pipe, arguments)
    assert graphs() > 0
    assert (images - eager).norm() < 0.02 * eager.norm()
    counts = pipe.trajectories["transformer"]
    assert (counts.total, counts.quantized) == (4, 3)
