"""A learned method that ends worse than it began keeps what it began with."""

import dataclasses
import logging

import pytest
import torch
from closed_loops import FAST
from small_models import denoiser

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.guard import keep_the_better, last_inputs
from modiff.calibration.loop.capture import ClosedLoop
from modiff.config import QuantConfig, QuantSpec
from modiff.errors import ConfigError
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest
from modiff.student.copies import shared_copy
from modiff.student.swap import operators

CONFIG = QuantConfig(QuantSpec(4, "channel"))


def sampling(student):
    """Two trajectories of four steps in which each input depends on the last output."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 8, 8, generator=generator)
        with modiff.trajectory(student):
            for step in range(4):
                x = x - 0.3 * student(x, torch.full((2, 4), float(step)))


def loop():
    teacher = denoiser()
    return ClosedLoop(modiff.quantize(shared_copy(teacher), CONFIG), teacher, sampling)


def weights(closed, bits):
    """Rounded to nearest at some bits, and stored at 4."""
    found = {}
    for name, operator in operators(closed.student).items():
        rounded = round_nearest(operator.module.weight, QuantSpec(bits, "channel"))
        spec = QuantSpec(4, "channel")
        again = round_nearest(rounded.dequantize(), spec)
        found[name] = PackedWeight.pack(again, spec)
    return found


def test_the_last_input_depends_on_the_student():
    closed = loop()
    found = last_inputs(closed, closed)
    assert sorted(found) == [0, 1]
    assert found[0].shape == (2, 3, 8, 8)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("learned_bits", [4, 2])
def test_the_better_weights_stay(learned_bits, caplog):
    closed = loop()
    learned, nearest = weights(closed, learned_bits), weights(closed, 4)
    with caplog.at_level(logging.WARNING, "modiff.calibration.guard"):
        kept = keep_the_better(closed, learned, nearest)
    expected = learned if learned_bits == 4 else nearest
    assert all(torch.equal(kept[name].codes, expected[name].codes) for name in expected)
    for name, operator in operators(closed.student).items():
        assert torch.equal(operator.packed.codes, expected[name].codes)
    said = [record.message for record in caplog.records if "rounded to nearest" in record.message]
    assert bool(said) == (learned_bits == 2)


def test_a_calibration_that_harms_gives_the_weights_it_began_with(monkeypatch):
    worse = weights(loop(), 2)
    monkeypatch.setattr("modiff.calibration.job.tune", lambda *args: worse)
    student = calibrate(denoiser(), CONFIG, sampling, "gptq", settings=FAST)
    plain = modiff.quantize(denoiser(), CONFIG)
    for name, operator in operators(student).items():
        assert torch.equal(operator.packed.codes, operators(plain)[name].packed.codes)
    settings = dataclasses.replace(FAST, compare_with_nearest=False)
    harmed = calibrate(denoiser(), CONFIG, sampling, "gptq", settings=settings)
    assert any(
        not torch.equal(operator.packed.codes, operators(plain)[name].packed.codes)
        for name, operator in operators(harmed).items()
    )


def test_the_setting_is_a_boolean():
    with pytest.raises(ConfigError, match="compare_with_nearest is 1; allowed are true and false"):
        CalibrationSettings(compare_with_nearest=1)
