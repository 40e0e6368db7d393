"""Scales and biases tuned on the denoiser's output, and the shift that quantized weights carry for it."""

import dataclasses

import pytest
import torch
from small_models import config, denoiser, modulated, noise
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.tuning import first_tensor, record_outputs, tune
from modiff.errors import CalibrationError, CheckpointError, ConfigError
from modiff.quantizers.packing import PackedWeight
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators

SETTINGS = CalibrationSettings(evaluations=3, samples=24, batch_size=16, tuning_iterations=150, tuning_rate=0.01)
FAST = dataclasses.replace(SETTINGS, tuning_iterations=5, positions=200)


def sampler(student):
    with modiff.trajectory(student):
        for args in noise(4, 8, 0):
            student(*args)


def tuned(teacher, weights=None, preset="w4a32-ptq-paper", settings=SETTINGS, run=sampler, folder="unused"):
    student = convert(shared_copy(teacher), config(preset), True, weights)
    loop = ClosedLoop(student, teacher, run)
    given = {name: op.packed for name, op in operators(student).items()}
    generator = torch.Generator().manual_seed(0)
    with SampleStore(folder, 2**24, "denoiser") as store:
        recorded = record_outputs(loop, loop.trace(), settings.evaluations, settings.samples, store, generator)
        return given, tune(loop, given, store, recorded, settings, generator), recorded


def error(teacher, weights, preset="w4a32-ptq-paper"):
    student = convert(shared_copy(teacher), config(preset), True, weights)
    with modiff.trajectory(student):
        return sum((student(*args) - teacher(*args)).square().mean().item() for args in noise(4, 8, 99))


def distorted(preset="w8a32-ptq"):
    """Good codes with wrong scales: outputs 10 % short, and off in the mean."""
    weights = {}
    for name, op in operators(convert(denoiser(), config(preset), True)).items():
        shift = 0.2 * torch.randn(op.packed.shape[0], generator=torch.Generator().manual_seed(1))
        weights[name] = dataclasses.replace(op.packed, scale=op.packed.scale * 0.9, shift=shift)
    return weights


@pytest.mark.parametrize("preset", ["w8a32-ptq", "w8a8-modiff"])
def test_wrong_scales_and_means_are_found_and_codes_stay(preset):
    teacher = denoiser()
    given, found, _ = tuned(teacher, distorted(preset), preset)
    assert error(teacher, found, preset) < 0.05 * error(teacher, given, preset)
    assert all(torch.equal(found[name].codes, given[name].codes) for name in given)


def test_rounding_to_nearest_loses_less_on_noise_it_has_not_seen():
    teacher = denoiser()
    given, found, _ = tuned(teacher)
    assert error(teacher, found) < 0.92 * error(teacher, given)  # random weights leave little that is systematic


@pytest.mark.parametrize("spec", [modiff.QuantSpec(4, "tensor"), modiff.QuantSpec(4, "group", False, group_size=3)])
def test_other_granularities_keep_their_scales_shape(spec):
    base = modiff.QuantConfig(weight=spec)
    student = calibrate(denoiser(), base, sampler, "gptq", settings=FAST)
    untuned = calibrate(denoiser(), base, sampler, "gptq", settings=dataclasses.replace(FAST, tuning_iterations=0))
    for new, old in zip(operators(student).values(), operators(untuned).values(), strict=True):
        assert torch.equal(new.packed.codes, old.packed.codes)
        ratio = new.packed.scale / old.packed.scale
        assert ratio.shape == old.packed.scale.shape
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
        assert old.packed.shift is None
        assert new.packed.shift.shape == (new.weight_shape[0],)


def test_nothing_is_tuned_where_nothing_is_wrong_or_no_step_is_taken():
    teacher = nn.Sequential(nn.Linear(3, 2))
    teacher[0].weight = nn.Parameter(torch.tensor([[127.0, 3.0, -5.0], [1.0, 127.0, 0.0]]))

    def run(student):
        with modiff.trajectory(student):
            student(torch.ones(2, 3))

    given, found, _ = tuned(teacher.requires_grad_(False), preset="w8a32-ptq", run=run)
    assert found == given
    given, found, _ = tuned(denoiser(), settings=dataclasses.replace(SETTINGS, tuning_iterations=0))
    assert found == given


def test_what_has_no_row_for_each_sample_is_kept_whole():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5, bias=False)

        def forward(self, x, t, ids):
            return {"sample": self.linear(x) * t + ids.sum()}

    torch.manual_seed(0)
    teacher = Timed().requires_grad_(False)

    def run(student):
        with modiff.trajectory(student):
            for t in range(3):
                student(
                    torch.randn(8, 5, generator=torch.Generator().manual_seed(t)), torch.tensor(t + 1.0), torch.ones(3)
                )

    _, found, recorded = tuned(teacher, run=run, preset="w3a32-ptq-paper")
    assert [set(e.whole) for e in recorded] == [{"input.1", "input.2"}] * 3
    assert [e.whole["input.1"].item() for e in recorded] == [1, 2, 3]
    assert sum(e.count for e in recorded) == 24
    assert found["linear"].shift is not None


def test_answers_without_tensor_are_refused():
    with pytest.raises(CalibrationError, match="returns a str, in which no tensor is found"):
        first_tensor("image")


def test_the_shift_enters_where_the_bias_does():
    """Invariant 1 with a shift: ô = A(â) + bias + shift; also where the original has no bias."""
    student = convert(denoiser(), config("w8a4-modiff-paper"), True, distorted())
    plain = convert(denoiser(), config("w8a4-modiff-paper"), True)
    with modiff.trajectory(student) as counts:
        for args in noise(4):
            output = student(*args)
        for name, op in modulated(student).items():
            cache = counts.caches[name][0]
            exact = op.product(cache.a_hat, with_bias=False)
            shape = [1, -1, 1, 1] if exact.ndim == 4 else [1, -1]
            bias = op.packed.shift if op.module.bias is None else op.packed.shift + op.module.bias
            assert torch.allclose(cache.o_hat, exact + bias.reshape(shape), atol=1e-5)
        assert operators(plain)["conv_out"].bias is None
        assert torch.equal(cache.o_hat, output)


def test_a_shift_is_saved_loaded_moved_and_restored(tmp_path):
    teacher = denoiser()
    before = [teacher(*args) for args in noise(3)]
    student = convert(denoiser(), config("w8a4-modiff-paper"), True, distorted())

    def outputs(model):
        with modiff.trajectory(model):
            return torch.stack([model(*args) for args in noise(3)])

    expected = outputs(student)
    modiff.save(student, tmp_path / "s")
    loaded = modiff.load(tmp_path / "s", denoiser(1))
    assert torch.equal(outputs(loaded), expected)
    assert torch.equal(outputs(loaded.to("cpu", torch.float32)), expected)
    with torch.device("meta"):
        empty = denoiser()
    assert torch.equal(outputs(modiff.load(tmp_path / "s", empty)), expected)
    restored = modiff.restore(student)
    assert all(torch.equal(a, restored(*args)) for a, args in zip(before, noise(3), strict=True))


def test_a_shift_of_another_size_is_refused():
    packed = operators(convert(denoiser(), config(), True))["time"].packed
    with pytest.raises(CheckpointError, match=r"shift of a weight \[8, 4\] has shape \[3\]; it needs \[8\]"):
        dataclasses.replace(packed, shift=torch.zeros(3))
    assert isinstance(packed, PackedWeight)


@pytest.mark.parametrize(
    ("fields", "match"),
    [({"tuning_iterations": -1}, "tuning_iterations is -1"), ({"tuning_rate": 2}, "tuning_rate is 2")],
)
def test_settings_are_checked(fields, match):
    with pytest.raises(ConfigError, match=match):
        CalibrationSettings(**fields)
