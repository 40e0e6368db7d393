"""What calibration, checkpoints and backends say of bad input, where no other test of theirs does."""

import dataclasses
import re

import pytest
import torch
from checkpoints import Denoiser, refuses, saved
from closed_loops import FAST
from small_models import denoiser
from torch import nn

import modiff
from modiff import QuantConfig, QuantSpec
from modiff.calibration import calibrate
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.moments import Moments
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.resume import StageFolder
from modiff.calibration.tuning import record_outputs
from modiff.config.quant import Split
from modiff.errors import CalibrationError, CheckpointError, ConfigError
from modiff.kernels import onednn
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest
from modiff.storage.folder import TENSORS
from modiff.student.copies import shared_copy

# --- calibration ------------------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """Operators in a block, and the time step as diffusers' denoisers get it: a number for the whole batch."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, timestep):
        return self.conv_out(self.block(self.conv_in(x)))


def timed():
    torch.manual_seed(0)
    return Timed().eval().requires_grad_(False)


def run_timed(student, broken=None):
    with modiff.trajectory(student):
        for i, t in enumerate((900, 450, 1)):
            x = torch.full((2, 3, 4, 4), float("nan") if i == broken else 1.0 + i)
            student(x, torch.tensor(t))


@pytest.mark.parametrize("method", ["gptq", "adaround", "brecq"])
def test_nan_names_the_operator_the_evaluation_and_the_time_step(method):
    model = timed()
    message = r"NaN or Inf in the input of operator 'conv_in' in evaluation 1 \(from 0\), time step 450\. Check the"
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, QuantConfig.preset("w4a4-modiff-paper"), lambda s: run_timed(s, 1), method, settings=FAST)
    assert type(model.conv_in) is nn.Conv2d


def broken_teacher(run=run_timed):
    """A loop whose teacher answers NaN, and its student does not."""
    teacher = timed()
    closed = ClosedLoop(modiff.quantize(shared_copy(teacher), QuantConfig.preset("w4a32-ptq-paper")), teacher, run)
    trace = closed.trace()
    teacher.block.register_forward_hook(lambda module, args, output: output * float("nan"))
    return closed, trace


def test_nan_in_a_blocks_target_names_the_block(tmp_path):
    closed, trace = broken_teacher()
    message = r"NaN or Inf in target of block 'block' in evaluation 0 \(from 0\), time step 900"
    with SampleStore(tmp_path / "s", 2**20, "block") as store, pytest.raises(CalibrationError, match=message):
        closed.samples("block", trace, None, 6, store, torch.Generator())
    assert not any(m._forward_pre_hooks for m in closed.student.block.modules())


def test_nan_in_the_teachers_answer_names_the_evaluation(tmp_path):
    closed, trace = broken_teacher()
    message = r"NaN or Inf in the teacher's answer in evaluation 0 \(from 0\), time step 900\. Check it in this dtype"
    with SampleStore(tmp_path / "s", 2**20, "student") as store, pytest.raises(CalibrationError, match=message):
        record_outputs(closed, trace, None, 6, store, torch.Generator())


def test_moments_beyond_float32_name_the_operator():
    model = denoiser()
    student = modiff.quantize(model, QuantConfig.preset("w4a32-ptq-paper"))
    moments = Moments.empty(student.time)
    moments.update(torch.full((1, 1, 4), 1e30), torch.ones(1, 1, 8))
    message = r"The moments of operator 'time' are not finite.*Rule\('time', weight=None\)"
    with pytest.raises(CalibrationError, match=message):
        moments.check("time")


def test_stage_of_other_operators_is_refused(tmp_path):
    spec = QuantSpec(4, "channel")
    folder = StageFolder(tmp_path, {"seed": 0})
    folder.write(0, {"conv_in": PackedWeight.pack(round_nearest(torch.ones(2, 3), spec), spec)})
    message = re.escape(f"{tmp_path / 'stage-0000'} holds a stage of other operators. Give a new folder.")
    with pytest.raises(CalibrationError, match=message):
        folder.read(0, {"conv_out": spec})
    with pytest.raises(CalibrationError, match=message):
        folder.read_ranges(0, ["conv_in"])
    assert list(folder.read(0, {"conv_in": spec})) == ["conv_in"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_models_that_a_checkpoints_rewrites_or_operators_do_not_fit(tmp_path):
    base = QuantConfig.preset("w4a4-modiff-paper")
    config = QuantConfig(base.weight, base.activation, base.modulation, splits=(Split("conv_in", 1),))
    saved(tmp_path / "split", config)
    other = Denoiser()
    other.conv_in = nn.Identity()
    refuses(tmp_path / "split", "does not fit this Denoiser: splits names 'conv_in' at channel 1", other)
    saved(tmp_path / "ckpt")
    hooked = Denoiser()
    hooked.time.register_forward_hook(lambda module, args, output: output)
    refuses(tmp_path / "ckpt", r"does not fit this Denoiser: Operator 'time' \(Linear\) has forward hooks", hooked)


def test_shift_of_another_size_is_refused():
    spec = QuantSpec(4, "channel")
    good = PackedWeight.pack(round_nearest(torch.randn(4, 6), spec), spec)
    with pytest.raises(CheckpointError, match=r"The shift of a weight \[4, 6\] has shape \[6\]; it needs \[4\]"):
        dataclasses.replace(good, shift=torch.zeros(6))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_flipped_bit_of_a_tensor_is_said(tmp_path, place):
    saved(tmp_path / "ckpt")
    file = tmp_path / "ckpt" / TENSORS
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int(place * (len(content) - start))] ^= 1
    file.write_bytes(content)
    refuses(tmp_path / "ckpt", "model.safetensors: tensor '.*' is damaged: its hash differs. Copy or save")


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "bits", "reason"),
    [
        ("available", 4, "this PyTorch has no oneDNN operators for int8"),
        ("exact_8bit", 8, "8-bit codes saturate on this CPU, which has no VNNI; use 7 bits"),
    ],
)
def test_backend_asked_for_by_name_on_a_machine_without_it(monkeypatch, missing, bits, reason):
    monkeypatch.setattr(onednn, missing, lambda: False)
    config = QuantConfig(QuantSpec(8, "channel"), QuantSpec(bits, "sample"), backend="onednn")
    message = f"backend 'onednn' cannot run operator 'conv_in' exactly: {reason}.*Use backend 'auto'"
    with pytest.raises(ConfigError, match=message):
        modiff.quantize(denoiser(), config)
