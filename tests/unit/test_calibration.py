"""Calibrations of small students: methods, seeds, restarts, and what is refused."""

import os

import pytest
import torch
from closed_loops import FAST, config, sampler
from small_models import noise
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.loop.samples import SampleStore
from modiff.errors import CalibrationError, ConfigError
from modiff.operators.modulated import ModulatedOperator
from modiff.student.swap import operators

DATA = ("gptq", "adaround", "brecq")


class ResidualNet(nn.Module):
    """Two residual blocks between two convolutions."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.time = nn.Linear(4, 8)

        def forward(self, x, skips, *, scale=1.0):
            h = self.first(x) + self.time(skips["time"])[:, :, None, None]
            return x + scale * self.second(nn.functional.silu(h))

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x, t):
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h, {"time": t}, scale=0.5)
        return self.conv_out(h)


def residual_net():
    torch.manual_seed(0)
    return ResidualNet().eval().requires_grad_(False)


def outputs(student, run_seed=5):
    with modiff.trajectory(student):
        return torch.stack([student(*args) for args in noise(4, 2, run_seed)])


def codes(student):
    return torch.cat([op.packed.codes for op in operators(student).values() if op.packed is not None])


@pytest.mark.parametrize("preset", ["w3a32-ptq-paper", "w3a4-ptq-paper", "w3a4-modiff-paper"])
@pytest.mark.parametrize("method", DATA)
def test_calibrated_students_are_closer_to_the_teacher_and_saved_bit_for_bit(method, preset, tmp_path):
    make = residual_net
    reference = torch.stack([make()(*args) for args in noise(4, 2, 5)])
    run = sampler(4, batch=4, trajectories=2)
    nearest = modiff.quantize(make(), config(preset))
    student = calibrate(make(), config(preset), run, method, settings=FAST)
    assert all(isinstance(op, ModulatedOperator) == ("modiff" in preset) for op in operators(student).values())
    assert not torch.equal(codes(student), codes(nearest))
    new, old = ((outputs(s) - reference).square().mean() for s in (student, nearest))
    assert new < (0.9 if "a32" in preset else 1.0) * old
    modiff.save(student, tmp_path / "s")
    assert torch.equal(outputs(modiff.load(tmp_path / "s", make())), outputs(student))


@pytest.mark.parametrize("method", DATA)
def test_same_seed_same_bits_and_the_teacher_comes_back(method):
    teacher = residual_net()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    torch.manual_seed(1)
    first = codes(calibrate(teacher, config(), sampler(), method, seed=3, settings=FAST))
    modiff.restore(teacher)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())
    torch.manual_seed(2)
    assert torch.equal(first, codes(calibrate(teacher, config(), sampler(), method, seed=3, settings=FAST)))


@pytest.mark.parametrize("method", ["gptq", "brecq"])
def test_killed_and_started_again_gives_the_same_bits(method, tmp_path):
    whole = codes(calibrate(residual_net(), config(), sampler(), method, settings=FAST))
    done = []

    def stop(count, total, name):
        done.append(count)
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(residual_net(), config(), sampler(), method, settings=FAST, folder=tmp_path, progress=stop)
    runs = []

    def counted(student):
        runs.append(1)
        sampler()(student)

    calls = []
    again = calibrate(
        residual_net(), config(), counted, method, settings=FAST, folder=tmp_path, progress=lambda *a: calls.append(a)
    )
    assert torch.equal(codes(again), whole)
    assert done == [1, 2]
    assert [call[0] for call in calls] == list(range(1, calls[0][1] + 1))
    assert len(runs) == 1 + calls[0][1] - 2 + 3  # the trace, the stages that were missing, and the comparison
    assert sorted(os.listdir(tmp_path)) == [f"stage-{i:04d}" for i in range(calls[0][1])]


def test_samples_that_spill_change_nothing(tmp_path, monkeypatch):
    held = codes(calibrate(residual_net(), config(), sampler(), "brecq", settings=FAST))
    spilled = []
    monkeypatch.setattr(
        "modiff.calibration.job.SampleStore", lambda folder, limit, owner: SampleStore(folder, 20_000, owner)
    )
    real = SampleStore._spill
    monkeypatch.setattr(SampleStore, "_spill", lambda self: (spilled.append(1), real(self)))
    student = calibrate(residual_net(), config(), sampler(), "brecq", settings=FAST, folder=tmp_path)
    assert spilled
    assert torch.equal(codes(student), held)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher": True}, "teacher"),
        ({"config": config("w4a4-modiff-paper")}, "config"),
        ({"seed": 1}, "seed"),
        ({"run": sampler(seed=9)}, "run"),
        ({"settings": CalibrationSettings(iterations=31)}, "settings"),
    ],
)
def test_a_folder_of_another_calibration_is_refused(change, field, tmp_path):
    calibrate(residual_net(), config(), sampler(), "gptq", settings=FAST, folder=tmp_path)
    given = {"config": config(), "run": sampler(), "seed": 0, "settings": FAST} | change
    teacher = residual_net()
    if given.pop("teacher", False):
        teacher.conv_in.weight[0] += 1
    with pytest.raises(CalibrationError, match=f"holds a calibration of another {field}"):
        calibrate(teacher, method="gptq", folder=tmp_path, **given)
    assert not hasattr(teacher, "_modiff_state")


def test_a_damaged_stage_is_refused(tmp_path):
    calibrate(residual_net(), config(), sampler(), "gptq", settings=FAST, folder=tmp_path)
    file = tmp_path / "stage-0001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CalibrationError, match="stage-0001 cannot be used.*Or delete it"):
        calibrate(residual_net(), config(), sampler(), "gptq", settings=FAST, folder=tmp_path)


def test_nan_names_the_operator_and_the_evaluation():
    def run(student):
        with modiff.trajectory(student):
            for i, (x, t) in enumerate(noise(4)):
                student(x, t * torch.inf if i == 2 else t)

    teacher = residual_net()
    with pytest.raises(CalibrationError, match=r"NaN or Inf in the input of operator 'blocks.0.time' in evaluation 2"):
        calibrate(teacher, config(), run, "gptq", settings=FAST)
    assert not hasattr(teacher, "_modiff_state")


def test_an_operator_that_is_never_called_is_named():
    class Unused(ResidualNet):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(4, 4)

    torch.manual_seed(0)
    model = Unused().eval().requires_grad_(False)
    with pytest.raises(CalibrationError, match="No data captured for operator 'extra'.*skip=True"):
        calibrate(model, config(), sampler(), "gptq", settings=FAST)
    calibrate(model, config("w3a4-modiff-paper", modiff.Rule("extra", skip=True)), sampler(), "gptq", settings=FAST)


def test_runs_that_cannot_be_used_are_refused():
    with pytest.raises(CalibrationError, match="never called the student"):
        calibrate(residual_net(), config(), lambda student: None, "gptq", settings=FAST)
    with pytest.raises(CalibrationError, match="outside a trajectory"):
        calibrate(residual_net(), config("w4a32-ptq-paper"), lambda s: s(*noise(1)[0]), "gptq", settings=FAST)
    with pytest.raises(ConfigError, match="method 'gptq' needs data"):
        calibrate(residual_net(), config(), method="gptq")
    with pytest.raises(ConfigError, match="method is 'best'; allowed are adaround, brecq"):
        calibrate(residual_net(), config(), sampler(), "best")
    with pytest.raises(ConfigError, match="seed is -1"):
        calibrate(residual_net(), config(), sampler(), seed=-1)


def test_methods_without_data():
    nearest = calibrate(residual_net(), config(), method="nearest")
    assert torch.equal(codes(nearest), codes(modiff.quantize(residual_net(), config())))
    lp = calibrate(residual_net(), config(), method="lp")
    for name, op in operators(lp).items():
        weight = residual_net().get_submodule(name).weight
        other = operators(nearest)[name].quantized_weight()
        assert (op.quantized_weight() - weight).abs().pow(2.4).sum() <= (other - weight).abs().pow(2.4).sum()


def test_full_precision_weights_need_no_data():
    student = calibrate(residual_net(), config("w32a4-modiff-paper"), sampler(), "gptq")
    assert all(op.packed is None for op in operators(student).values())
