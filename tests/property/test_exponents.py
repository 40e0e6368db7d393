"""Scales in powers of two: the exponents are exact, at most one bit is lost, and codes fit the container."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modiff.config import QuantSpec
from modiff.errors import ConfigError
from modiff.operators.reference import ReferenceOperator, quantize_by_exponents
from modiff.quantizers.exponents import exponents

POSITIVE = st.floats(2.0**-100, 2.0**100, width=32, allow_subnormal=False)
NARROW = [QuantSpec(bits, "sample_channel", symmetric, scales="power_of_two") for symmetric in (True, False)
          for bits in range(2, 8 if symmetric else 7)]  # fmt: skip


def whole_log2(ratio):
    """floor(log2(ratio)) of a Fraction, by integers alone."""
    e = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    return e if Fraction(2) ** e <= ratio else e - 1


@given(POSITIVE, POSITIVE, st.integers(1, 6))
def test_exponents_are_those_of_exact_arithmetic(own, shared, most):
    own, shared = min(own, shared), max(own, shared)
    found = exponents(torch.tensor([own]), torch.tensor([shared]), most).item()
    assert found == min(max(whole_log2(Fraction(shared) / Fraction(own)), 0), most)


@given(st.integers(-20, 20), st.integers(1, 6))
def test_next_to_a_power_of_two_no_rounding_shows(power, most):
    shared = torch.tensor([2.0**power])
    below, above = torch.nextafter(shared, torch.zeros(1)), torch.nextafter(shared, torch.full((1,), math.inf))
    assert exponents(shared / 4, shared, most).item() == min(2, most)
    assert exponents(below / 4, shared, most).item() == min(2, most)
    assert exponents(above / 4, shared, most).item() == min(1, most)


def test_a_channel_of_zeros_gets_the_largest_exponent():
    found = exponents(torch.tensor([0.0, 1.0]), torch.tensor(1.0), most=3)
    assert found.tolist() == [3, 0]
    assert exponents(torch.zeros(2), torch.zeros(1), most=3).tolist() == [3, 3]


@given(st.lists(POSITIVE, min_size=1, max_size=8), st.integers(1, 6))
def test_at_most_one_bit_is_lost(scales, most):
    own = torch.tensor(scales)
    shared = own.max()
    e = exponents(own, shared, most)
    final = shared.double() * 2.0 ** -e.double()
    assert (final >= own.double()).all()
    assert (final < 2 * own.double())[e < most].all()


@pytest.mark.parametrize("spec", NARROW, ids=str)
def test_every_code_times_its_power_fits_int8(spec):
    largest = max(map(abs, spec.code_range))
    assert 1 <= spec.spare_bits <= 6
    assert largest * 2**spec.spare_bits <= 127


@pytest.mark.parametrize("spec", NARROW, ids=str)
def test_the_reference_loses_at_most_one_bit_against_real_scales(spec):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 5, generator=generator, dtype=torch.float64)
    x *= 10.0 ** torch.tensor([0.0, -0.3, -0.7, -1.0, -1.3, 0.1], dtype=torch.float64)[None, :, None, None]
    labels = torch.arange(12).reshape(2, 6, 1, 1).expand(x.shape)
    samples = torch.arange(2).reshape(2, 1, 1, 1).expand(x.shape)
    error = (quantize_by_exponents(x, labels, samples, spec, 1.0) - x).abs().amax((2, 3))
    span = x.abs().amax((2, 3)) if spec.symmetric else x.amax((2, 3)) - x.amin((2, 3))
    own, top = span / spec.code_range[1], spec.code_range[1]
    most = span.amax(1, keepdim=True) / top * 2.0**-spec.spare_bits
    # Half a step of a scale below twice its own, and half more where the zero point was rounded.
    assert (error <= (0.5 if spec.symmetric else 1.0) * torch.maximum(2 * own, most) * (1 + 1e-12)).all()


def test_the_reference_runs_a_trajectory():
    spec = QuantSpec(4, "sample_channel", symmetric=False, scales="power_of_two")
    torch.manual_seed(0)
    operator = ReferenceOperator(torch.nn.Conv2d(4, 3, 3), None, spec, None)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    error = (operator.evaluate(x) - operator.with_bias(x.double())).norm() / operator.with_bias(x.double()).norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"bits": 8, "granularity": "sample_channel"},
            "with bits=8: such codes fill their container .* at most 7 bits",
        ),
        ({"bits": 7, "granularity": "sample_channel", "symmetric": False}, "bits=7: .* Use at most 6 bits"),
        ({"bits": 4, "granularity": "sample"}, "granularity 'sample'; it exists for 'sample_channel' only"),
        ({"bits": 4, "granularity": "channel"}, "granularity 'channel'; it exists for 'sample_channel' only"),
    ],
)
def test_what_the_container_cannot_hold_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        QuantSpec(**fields, scales="power_of_two")


def test_an_unknown_kind_of_scales_is_refused():
    with pytest.raises(ConfigError, match="scales is 'half'; allowed are real, power_of_two"):
        QuantSpec(4, "sample_channel", scales="half")
