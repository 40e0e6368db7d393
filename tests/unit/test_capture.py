"""Closed-loop capture on small students: the trace, moments, samples on disk, blocks and stages."""

import pytest
import torch
from closed_loops import FAST, config, sampler
from small_models import denoiser, noise, tiny_unet
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings
from modiff.calibration.loop import samples as samples_module
from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.moments import input_vectors, output_vectors
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.tracing import Trace
from modiff.calibration.stages import plan_stages
from modiff.calibration.weights import weight_method
from modiff.errors import CalibrationError
from modiff.student.blocks import find_blocks
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators


def loop(preset="w4a4-modiff-paper", run=None, teacher=None):
    teacher = teacher or denoiser()
    return ClosedLoop(convert(shared_copy(teacher), config(preset), True), teacher, run or sampler())


# --- where data come from ---------------------------------------------------------------------------------------------


def test_trace_counts_trajectories_evaluations_and_order():
    trace = loop(run=sampler(evaluations=5, trajectories=2)).trace()
    assert trace.lengths == [5, 5]
    assert trace.order == ["conv_in", "time", "conv_out"]
    assert trace.calls == {"conv_in": 1, "time": 1, "conv_out": 1}
    assert trace.digest == loop(preset="w2a8-ptq-paper", run=sampler(5, trajectories=2)).trace().digest
    assert trace.digest != loop(run=sampler(5, trajectories=2, seed=1)).trace().digest


@pytest.mark.parametrize(
    ("count", "expected"), [(None, list(range(10))), (10, list(range(10))), (4, [0, 3, 6, 9]), (1, [5]), (2, [0, 9])]
)
def test_evaluations_are_sampled_evenly(count, expected):
    trace = Trace(lengths=[10, 3])
    assert trace.choose(count) == expected
    assert trace.recorded(expected) == len(expected) + sum(i < 3 for i in expected)


def test_moments_are_of_the_reconstruction_that_the_weight_is_applied_to(tmp_path):
    """Trap 7: the input of a modulated operator is â of the closed loop, so that A(â) + bias is its output."""
    closed = loop("w4a3-modiff-paper")
    seen = []

    def hook(operator, args, output):
        a_hat = operator.state.trajectory.caches["time"][0].a_hat.clone()
        assert torch.allclose(operator.product(a_hat, True), output, atol=1e-4)
        seen.append((args[0].clone(), a_hat))

    operator = operators(closed.student)["time"]
    handle = operator.register_forward_hook(hook)
    trace = closed.trace()
    seen.clear()
    moments = closed.moments(["time"], trace, None, 1000, torch.Generator(), tmp_path, 0)["time"]
    handle.remove()
    given, a_hat = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.allclose(moments.hessian[0], a_hat.T @ a_hat, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moments.hessian[0], given.T @ given, rtol=1e-3, atol=1e-3)
    target = given @ operator.module.weight.T  # this operator's input is the same in teacher and student
    assert torch.allclose(moments.cross[0], target.T @ a_hat, rtol=1e-4, atol=1e-4)
    assert moments.count == 8


def test_targets_are_the_teachers_answers_to_the_students_images(tmp_path):
    closed = loop("w2a32-ptq-paper")
    moments = closed.moments(["conv_out"], closed.trace(), 2, 10**6, torch.Generator(), tmp_path, 0)["conv_out"]
    teacher, power = denoiser(), 0.0
    for args in [noise(4)[0], noise(4)[3]]:
        power += teacher(*args).square().sum().item()
    assert moments.power.item() == pytest.approx(power, rel=1e-4)
    assert moments.count == 2 * 2 * 64


def test_the_student_is_left_without_hooks_and_the_teacher_as_it_was(tmp_path):
    closed = loop()
    before = {name: t.clone() for name, t in closed.teacher.state_dict().items()}
    trace = closed.trace()
    closed.moments(["conv_in"], trace, 2, 100, torch.Generator(), tmp_path, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in closed.teacher.modules())
    assert not any(op._forward_hooks for op in operators(closed.student).values())
    assert all(torch.equal(before[name], t) for name, t in closed.teacher.state_dict().items())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(4, 6, 3, padding="valid", groups=2),
        nn.Conv3d(4, 6, 2, stride=2, padding=1, padding_mode="replicate"),
        nn.Linear(4, 6),
    ],
    ids=repr,
)
def test_input_vectors_times_the_weight_are_the_outputs(conv):
    kind = "linear" if isinstance(conv, nn.Linear) else "conv"
    x = torch.randn(3, 5, 4) if kind == "linear" else torch.randn(2, 4, *[7, 6, 5][: len(conv.kernel_size)])
    y = conv(x).detach()
    count = y.numel() // 6
    places = torch.randperm(count)[: max(3, count // 2)]
    vectors = input_vectors(conv, kind, x, places)
    groups = getattr(conv, "groups", 1)
    weight = conv.weight.reshape(groups, 6 // groups, -1)
    expected = output_vectors(conv, kind, y, places)
    assert torch.allclose(torch.einsum("ngk,gok->ngo", vectors, weight), expected, atol=1e-5)


# --- samples on disk --------------------------------------------------------------------------------------------------


def test_store_gives_back_every_row_from_memory_and_disk(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = [{"a": torch.randn(5, 8, generator=generator), "b": torch.arange(5) + 5 * i} for i in range(6)]
    with SampleStore(tmp_path / "s", limit=7 * 40, owner="block") as store:
        for part in parts:
            store.append(part)
        assert len(store) == 30
        assert store.num_shards > 3
        assert store.peak_bytes <= 7 * 40
        order = torch.randperm(30, generator=generator)
        rows = store.rows(order)
        assert torch.equal(rows["a"], torch.cat([p["a"] for p in parts])[order])
        assert torch.equal(rows["b"], order)
        with pytest.raises(IndexError, match="store of 30"):
            store.rows(torch.tensor([30]))
    assert not (tmp_path / "s").exists()


def test_memory_held_stays_within_the_limit(tmp_path):
    psutil = pytest.importorskip("psutil")
    process, limit = psutil.Process(), 8 * 2**20
    piece = torch.randn(16, 2**16)  # 4 MiB
    with SampleStore(tmp_path / "s", limit, "block") as store:
        store.append({"x": piece})
        start, peak = process.memory_info().rss, 0
        for _ in range(30):  # 120 MiB
            store.append({"x": piece})
            peak = max(peak, process.memory_info().rss)
        assert peak - start < 3 * limit  # the store's own, the allocator's and the file cache's slack
        assert store.peak_bytes <= limit


def test_what_a_killed_process_left_is_never_read(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "samples-00000.safetensors").write_bytes(b"half")
    with SampleStore(folder, 80, "block") as store:
        store.append({"x": torch.ones(9, 5)})
        assert store.num_shards > 0
        assert torch.equal(store.rows(torch.arange(9))["x"], torch.ones(9, 5))


def test_full_disk_is_cleaned_up_and_said(tmp_path, monkeypatch):
    written = []

    def save(tensors, path):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    real = samples_module.save_file
    monkeypatch.setattr(samples_module, "save_file", save)
    with SampleStore(tmp_path / "s", 80, "down.block") as store:
        with pytest.raises(CalibrationError, match="'down.block' do not fit on the disk.*No space left"):
            store.append({"x": torch.ones(90, 5)})
        assert len(written) == 3
        assert not (tmp_path / "s").exists()
        assert len(store) == 0


def test_row_larger_than_the_limit_is_refused(tmp_path):
    with (
        SampleStore(tmp_path / "s", 79, "block") as store,
        pytest.raises(CalibrationError, match="takes 80 bytes, but only 79"),
    ):
        store.append({"x": torch.ones(1, 20)})


# --- blocks and stages ------------------------------------------------------------------------------------------------


def test_arguments_are_rebuilt():
    x, t = torch.ones(2, 3), torch.zeros(2)
    arguments, tensors = CallArguments.of((x, None, [t, 1.5]), {"d": {"k": (x,)}, "flag": True})
    args, kwargs = arguments.build(tensors)
    assert args[0] is x
    assert args[1:] == (None, [t, 1.5])
    assert kwargs["d"]["k"][0] is x
    assert kwargs["flag"] is True
    assert CallArguments.of((x * 2, None, [t, 1.5]), {"d": {"k": (x,)}, "flag": True})[0] == arguments
    assert CallArguments.of((x, None, [t, 2.5]), {"d": {"k": (x,)}, "flag": True})[0] != arguments


def test_blocks_of_a_diffusers_unet_are_its_resnets_attentions_and_embedding():
    unet = tiny_unet()

    def run(student):
        with modiff.trajectory(student):
            student(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 5)

    closed = loop("w4a32-ptq-paper", run, unet)
    trace = closed.trace()
    blocks = find_blocks(unet, trace.order, trace.usable)
    types = {type(unet.get_submodule(name)).__name__ for name in blocks}
    assert types == {"ResnetBlock2D", "Attention", "TimestepEmbedding"}
    alone = set(trace.order) - {name for held in blocks.values() for name in held}
    assert {name.rpartition(".")[2] for name in alone} == {"conv_in", "conv_out", "conv"}
    stages = plan_stages(unet, operators(closed.student), trace.order, trace, weight_method("brecq"), FAST)
    assert sorted(name for stage in stages for name in stage.operators) == sorted(trace.order)


def test_stages_respect_size_and_memory():
    closed = loop("w4a32-ptq-paper")
    trace, found = closed.trace(), operators(closed.student)
    stages = plan_stages(closed.teacher, found, trace.order, trace, weight_method("gptq"), FAST)
    assert [stage.operators for stage in stages] == [("conv_in", "time"), ("conv_out",)]
    # Operators with the teacher's targets must not share a run: each would make up for the same earlier error.
    stages = plan_stages(closed.teacher, found, trace.order, trace, weight_method("adaround"), FAST)
    assert [stage.operators for stage in stages] == [("conv_in",), ("time",), ("conv_out",)]
    wide = nn.Sequential(nn.Linear(600, 600))
    tight = CalibrationSettings(memory_mib=1)
    closed = ClosedLoop(convert(shared_copy(wide), config("w4a32-ptq-paper"), True), wide, _linear_run)
    with pytest.raises(CalibrationError, match="moments of operator '0' take 3 MiB, but memory_mib is 1"):
        plan_stages(wide, operators(closed.student), ["0"], closed.trace(), weight_method("gptq"), tight)


def _linear_run(student):
    with modiff.trajectory(student):
        student(torch.ones(1, 600))
