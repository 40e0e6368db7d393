"""A backend of a few lines, registered from outside: the whole parity suite runs on it."""

import pytest
import test_reference
import torch
from small_models import config, denoiser, noise, run

import modiff
from modiff.config import quant
from modiff.errors import ConfigError
from modiff.kernels import accumulate
from modiff.kernels.backend import BACKENDS, Backend, Prepared, integer_obstacle, register
from modiff.kernels.elementwise import ElementwiseBackend


@pytest.fixture
def products():
    """Registers the toy as the fastest backend; holds the shapes of the operators that it multiplied."""
    known, names, found = dict(BACKENDS), list(quant.BACKENDS), []

    @register(speed=1000.0)
    class Toy(ElementwiseBackend):
        """Exact sums of codes in float64."""

        name = "toy"

        def zero(self, quantizer):
            return 128

        def obstacle(self, shape, quantizer, device, dtype):
            return integer_obstacle(shape, quantizer)

        def prepare(self, weight, shape):
            unpacked = weight.unpack()
            codes = unpacked.codes if unpacked.zero_point is None else unpacked.codes - unpacked.zero_point
            scale = weight.scale.reshape(-1).expand(shape.out_channels)
            return Prepared(shape, (codes, scale.reshape(-1, *[1] * len(shape.kernel))))

        def multiply(self, prepared, encoded):
            codes, scale = prepared.weight
            found.append(prepared.shape)
            sums = accumulate(encoded.codes.double() - encoded.zero, codes, prepared.shape)
            return (sums * scale).to(scale.dtype)

    yield found
    BACKENDS.clear()
    BACKENDS.update(known)
    quant.BACKENDS[:] = names


@pytest.mark.parametrize("case", test_reference.CASES, ids=lambda case: "-".join(str(value) for value in case))
def test_students_on_the_toy_follow_the_reference(products, case):
    _, granularity, bits, weight, symmetric, *_ = case
    test_reference.test_float64_students_follow_the_reference(case)
    exact = granularity in ("tensor", "sample", "token") and weight in ("tensor", "channel")
    assert bool(products) == (exact and (symmetric or bits < 8))


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a8-modiff", "w4a4-ptq-paper"])
def test_whole_students_on_the_toy_agree_with_the_simulation(products, preset):
    expected, _ = run(modiff.quantize(denoiser(), config(preset)), noise(6))
    assert products
    base = config(preset)
    simulated = modiff.QuantConfig(base.weight, base.activation, base.modulation, backend="simulate")
    found, _ = run(modiff.quantize(denoiser(), simulated), noise(6))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()  # single codes of deeper operators may differ by one


def test_a_registered_backend_can_be_asked_for_by_name(products):
    assert isinstance(BACKENDS["toy"], Backend)
    asked = modiff.QuantConfig(modiff.QuantSpec(8), modiff.QuantSpec(4, "sample"), modiff.Modulation(), backend="toy")
    assert {row.backend for row in modiff.describe(modiff.quantize(denoiser(), asked))} == {"toy"}
    asked = modiff.QuantConfig(modiff.QuantSpec(8), modiff.QuantSpec(4, "channel"), None, backend="toy")
    with pytest.raises(ConfigError, match="backend 'toy' cannot run operator 'conv_in' exactly: scales per channel"):
        modiff.quantize(denoiser(), asked)


def test_a_backend_that_is_not_registered_is_refused():
    with pytest.raises(ConfigError, match="backend is 'toy'; allowed are auto, simulate, onednn, cpp"):
        modiff.QuantConfig(backend="toy")


def test_a_device_without_integer_backends_is_simulated_and_says_why():
    model = modiff.quantize(denoiser(), config("w8a4-modiff-paper"))
    choice = model.conv_in.choice(torch.device("meta"))
    assert str(choice) == "simulate (triton runs on cuda, not on meta; onednn runs on cpu, not on meta)"
