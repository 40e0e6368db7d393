"""What calibration of ranges refuses: too little data or memory, NaN, settings that cannot be."""

import dataclasses

import pytest
from range_cases import FAST, calibrated, config
from small_models import denoiser, noise
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.ranges import observe as ranges_module
from modiff.errors import CalibrationError, ConfigError
from modiff.operators.modulated import ModulatedOperator


def test_more_buckets_than_steps():
    message = "timestep_buckets is 7, but a trajectory has 6 evaluations only. Use at most 6"
    with pytest.raises(CalibrationError, match=message):
        calibrated(buckets=7)


def test_buckets_that_no_recorded_evaluation_reaches():
    message = "'conv_in' has 6 buckets of time steps, but range_evaluations 3 reaches 3 of them only. Raise it"
    with pytest.raises(CalibrationError, match=message):
        calibrated(dataclasses.replace(FAST, range_evaluations=3), buckets=6)
    calibrated(dataclasses.replace(FAST, range_evaluations=3), buckets=3)


def test_an_operator_that_is_never_called():
    model = denoiser()
    model.spare = nn.Linear(3, 3)
    with pytest.raises(CalibrationError, match="No data captured for operator 'spare'"):
        calibrated(model=model)
    assert type(model.spare) is nn.Linear


def test_nan_in_activations_says_where():
    def run(student):
        with modiff.trajectory(student):
            for i, args in enumerate(noise(4)):
                student(args[0] * (float("nan") if i == 2 else 1), args[1])

    message = r"NaN or Inf in the input of operator 'conv_in' in evaluation 2 \(from 0\)"
    with pytest.raises(CalibrationError, match=message):
        calibrated(run=run)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_that_comes_with_the_static_ranges_says_where(monkeypatch, value):
    quantizer_input = ModulatedOperator.quantizer_input

    def broken(self, x):
        found = quantizer_input(self, x)
        if found is not None and self.name == "time" and self.calibrated is not None:
            found = found * value
        return found

    monkeypatch.setattr(ModulatedOperator, "quantizer_input", broken)
    message = r"NaN or Inf in the input of operator 'time' in evaluation 1 \(from 0\)"
    with pytest.raises(CalibrationError, match=message):
        calibrated()


def test_statistics_that_do_not_fit():
    settings = dataclasses.replace(FAST, ranges="lp", bins=200_000, memory_mib=1)
    message = (
        "statistics of operator 'conv_in' take 2 MiB, but memory_mib is 1. Raise it, lower timestep_buckets or bins"
    )
    with pytest.raises(CalibrationError, match=message):
        calibrated(settings)


def test_a_sample_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(CalibrationSettings, "memory", property(lambda self: 2 * 2**10))
    monkeypatch.setattr(ranges_module, "observer_bytes", lambda *_: 0)
    with pytest.raises(CalibrationError, match="One sample of 'conv_out' takes 2056 bytes, but only 2048"):
        calibrated(dataclasses.replace(FAST, ranges="lsq"))


def test_calibrated_ranges_need_a_run():
    with pytest.raises(ConfigError, match="range 'calibrated' needs data. Give run, a function that samples"):
        calibrate(denoiser(), config(), method="nearest")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranges": "max"}, "ranges is 'max'; allowed are minmax, moving_average, percentile, lp, lsq."),
        ({"range_evaluations": 0}, "range_evaluations is 0; give a whole number of at least 1, or None for all."),
        ({"range_passes": 0}, "range_passes is 0; allowed are whole numbers of at least 1."),
        ({"percentile": 101}, "percentile is 101; allowed is 50 to 100."),
        ({"range_norm": 0.5}, "range_norm is 0.5; allowed is 1 to 10."),
        ({"bins": 255}, "bins is 255; give an even number, half of them for negative values."),
        ({"lsq_iterations": 0}, "lsq_iterations is 0; allowed are whole numbers of at least 1."),
        ({"lsq_learning_rate": 2}, "lsq_learning_rate is 2; allowed is 0 to 1."),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings(**fields)
