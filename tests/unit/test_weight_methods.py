"""Weight methods register: one file of one's own, and everything that calibrates knows it."""

import pytest
import torch
from closed_loops import FAST, config, sampler
from small_models import denoiser

import modiff
from modiff.calibration import calibrate
from modiff.calibration.weights import WeightMethod, methods, register, weight_method, weight_methods
from modiff.errors import ConfigError
from modiff.quantizers.rounding import QuantizedWeight, round_nearest
from modiff.student.swap import operators


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


def test_the_packaged_methods_are_found_by_their_files():
    assert weight_methods() == ("adaround", "brecq", "gptq", "lp", "nearest")


def test_a_method_without_data_is_one_class(registry, tmp_path):
    @register("floor")
    class Floor(WeightMethod):
        """Round down."""

        def round(self, problem, settings):
            grid = problem.nearest()
            codes = (problem.weight / grid.scale).floor().clamp(*problem.spec.code_range)
            return QuantizedWeight(codes, grid.scale, grid.zero_point, grid.num_scales)

    student = calibrate(denoiser(), config(), method="floor")
    for operator in operators(student).values():
        weight = operator.module.weight
        grid = round_nearest(weight, operator.weight_spec)
        expected = (weight / grid.scale).floor().clamp(*operator.weight_spec.code_range)
        assert torch.equal(operator.packed.unpack().codes, expected)
        assert not torch.equal(expected, grid.codes)
    modiff.save(student, tmp_path / "s")
    loaded = operators(modiff.load(tmp_path / "s", denoiser()))
    for name, operator in operators(student).items():
        assert torch.equal(loaded[name].packed.codes, operator.packed.codes)


def test_a_method_with_data_gets_moments_in_stages_of_its_size(registry):
    seen = []

    @register("toy")
    class Toy(WeightMethod):
        """Round to nearest, with data or without."""

        uses_data = True

        def operators_per_run(self, settings):
            return 2

        def solve(self, problem, moments, settings):
            seen.append((problem.name, moments.count))
            return problem.nearest()

    told = []
    calibrate(denoiser(), config(), sampler(), "toy", settings=FAST, progress=lambda *what: told.append(what))
    assert [name for name, _ in seen] == list(operators(modiff.quantize(denoiser(), config())))
    assert all(count > 0 for _, count in seen)
    assert [what for *_, what in told] == ["conv_in, time", "conv_out", "scales and biases"]


def test_recipes_know_a_registered_method(registry):
    from modiff.lit.modules.calibration_config import CalibrationConfig

    with pytest.raises(ConfigError, match="method is 'toy'; allowed are adaround, brecq, gptq, lp, nearest"):
        CalibrationConfig(method="toy")

    @register("toy")
    class Toy(WeightMethod):
        """Does nothing yet."""

    assert CalibrationConfig(method="toy").method == "toy"
    assert isinstance(weight_method("toy"), Toy)


def test_names_are_given_once(registry):
    with pytest.raises(ConfigError, match="There is a weight method 'gptq' already. Give another name."):
        register("gptq")(WeightMethod)
