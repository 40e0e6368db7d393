"""Scales that are powers of two times one per sample: the same codes on every backend, exact sums, exact states."""

import pytest
import torch
from small_models import denoiser, drift, noise, run
from torch import nn

import modiff
from modiff.config import Modulation, QuantConfig, QuantSpec, Special
from modiff.errors import TrajectoryError
from modiff.kernels.accumulate import accumulate
from modiff.kernels.backend import BACKENDS, Held, Quantizer
from modiff.operators.reference import ReferenceOperator
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import activation_partition

WEIGHT = QuantSpec(8, "channel")
INTEGER = [name for name in BACKENDS if name == "onednn"]


def powers(bits=4, symmetric=False, clip=1.0):
    return QuantSpec(bits, "sample_channel", symmetric, clip=clip, scales="power_of_two")


def uneven(shape, channel, seed=0):
    """An input whose channels differ by up to a thousand times, one of them 0."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    size = [1] * len(shape)
    size[channel] = -1
    factors = 10.0 ** -torch.linspace(0, 3, shape[channel])
    factors[1] = 0
    return x * factors.reshape(size)


def quantizer(spec, x, kind, batched=True):
    return Quantizer(spec, activation_partition(spec, x.ndim, kind, batched), Limits.of(spec, x))


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "channel"), [("conv", (3, 6, 4, 4), 1), ("linear", (3, 5, 6), 2), ("conv", (6, 4, 4), 0)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_integer_codes_are_those_of_the_definition(bits, symmetric, kind, shape, channel, channels_last):
    spec = powers(bits, symmetric)
    x = uneven(shape, channel)
    if channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    how = quantizer(spec, x, kind, batched=x.ndim == 4 or kind == "linear")
    values = BACKENDS["simulate"].encode(x, None, how).codes.clone()
    for name in INTEGER:
        encoded = BACKENDS[name].encode(x, None, how)
        assert encoded.codes.dtype == torch.uint8
        codes = encoded.codes.int() - encoded.zero
        assert codes.abs().max() <= 127
        assert torch.equal(codes * encoded.scale, values)
        assert encoded.scale.numel() == (shape[0] if len(shape) == 4 or kind == "linear" else 1)
    assert (values.select(channel, 1) == 0).all()


def test_a_finer_channel_gets_finer_codes():
    x = uneven((2, 6, 8, 8), 1)
    plain = quantizer(QuantSpec(4, "sample", symmetric=False), x, "conv")
    errors = [
        (BACKENDS["simulate"].encode(x, None, how).codes - x).abs().amax((0, 2, 3))
        for how in (quantizer(powers(), x, "conv"), plain)
    ]
    assert errors[0][2] < errors[1][2] / 2
    assert errors[0].norm() <= errors[1].norm() * 1.1  # zero points are rounded to whole codes


def operator(module, spec, backend, **modulation):
    config = QuantConfig(WEIGHT, spec, Modulation(**modulation), backend=backend)
    return modiff.quantize(nn.Sequential(module), config)


@pytest.mark.parametrize("backend", ["simulate", *INTEGER])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("warmup", ["full", "refine"])
def test_a_trajectory_is_the_references(backend, symmetric, warmup):
    torch.manual_seed(0)
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    spec, modulation = powers(4, symmetric, clip=0.9), Modulation(warmup=warmup)
    reference = ReferenceOperator(module, WEIGHT, spec, modulation)
    student = operator(module, spec, backend, warmup=warmup)
    inputs = [x * uneven((1, 6, 1, 1), 1).abs() for x in drift((2, 6, 5, 5), 5)]
    with modiff.trajectory(student):
        for x in inputs:
            expected = reference.evaluate(x)
            # Float32 residuals lie next to a rounding boundary now and then; float64 ones do not lie there too.
            error = (student(x).double() - expected).norm() / expected.norm()
            assert error < 2e-2
    assert str(modiff.describe(student)).count(backend) >= 1


def test_backends_give_the_same_trajectory():
    torch.manual_seed(0)
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    inputs = [x * uneven((1, 6, 1, 1), 1).abs() for x in drift((2, 6, 5, 5), 6)]
    outputs = {}
    for name in ("simulate", *INTEGER):
        student = operator(nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False), powers(), name)
        student[0].module.load_state_dict(module.state_dict())
        student[0].quantize_weight()
        with modiff.trajectory(student):
            outputs[name] = [student(x) for x in inputs]
    for name in INTEGER:
        for a, b in zip(outputs[name], outputs["simulate"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", INTEGER)
def test_sums_are_exact(name):
    torch.manual_seed(0)
    module = nn.Linear(6, 5, bias=False).requires_grad_(False)
    student = operator(module, powers(), name)
    inner, x = student[0], uneven((2, 7, 6), 2)
    how = quantizer(powers(), x, "linear")
    backend = BACKENDS[name]
    encoded = backend.encode(x, None, how)
    product = backend.multiply(backend.prepare(inner.packed, inner.shape), encoded)
    exact = accumulate(encoded.codes.double() - encoded.zero, inner.packed.unpack().codes, inner.shape)
    assert torch.equal(product.double(), (exact * inner.packed.scale.reshape(-1).double()).float().double())


@pytest.mark.parametrize("backend", ["simulate", *INTEGER])
def test_an_int16_reconstruction_moves_exactly(backend):
    torch.manual_seed(0)
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    student = operator(module, powers(), backend, reconstruction_dtype="int16")
    inputs = [x * uneven((1, 6, 1, 1), 1).abs() for x in drift((2, 6, 5, 5), 8)]
    with modiff.trajectory(student) as trajectory:
        for x in inputs:
            output = student(x)
        held = next(iter(trajectory.caches.values()))[0].held
        assert held.a_hat.dtype == torch.int16
        expected = nn.functional.conv2d(held.value(), student[0].quantized_weight(), module.bias, padding=1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)  # the invariant
    assert (held.value() - inputs[-1]).norm() / inputs[-1].norm() < 0.05


def test_a_scale_in_whole_steps_still_loses_at_most_one_bit():
    x = uneven((2, 6, 8, 8), 1)
    step = torch.tensor(1e-3)
    how = quantizer(powers(), x, "conv")
    low, high = how.partition.range(x)
    scale, _, power, unit = how.limits.shared_scale(low, high, how.partition, step)
    own = (high.clamp(min=0) - low.clamp(max=0)) / 15
    assert torch.equal((unit / step).round() * step, unit)
    assert torch.equal(unit * power, scale)
    assert (scale >= own * (1 - 1e-6)).all()
    assert (scale < 2 * own * (1 + 1e-6))[power > 1].all()


def test_vectors_get_one_scale_a_sample():
    how = quantizer(powers(), torch.zeros(3, 6), "linear")
    assert how.partition.keep == (0,)
    assert how.partition.shared is None


def test_what_is_not_finite_is_named():
    student = modiff.quantize(denoiser(), QuantConfig(WEIGHT, powers(), Modulation()))
    arguments = noise(3)
    arguments[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(TrajectoryError, match="operator 'conv_in', first in evaluation 1 of 3"):
        run(student, arguments)


def test_other_integer_backends_say_that_they_cannot():
    from modiff.kernels.backend import OperatorShape, integer_obstacle

    shape, x = OperatorShape("linear", 6, 5, WEIGHT), torch.zeros(2, 3, 6)
    assert "scales in powers of two" in integer_obstacle(shape, quantizer(powers(), x, "linear"))
    assert integer_obstacle(shape, quantizer(powers(), x, "linear"), powers=True) is None


def test_vectors_are_found_in_the_first_evaluation():
    config = QuantConfig(
        WEIGHT, QuantSpec(4, "sample"), Modulation(), vectors=Special(activation=QuantSpec(8, "sample"))
    )
    student = modiff.quantize(denoiser(), config)
    assert {row.special for row in modiff.describe(student)} == {"undecided"}
    assert "undecided" in str(modiff.describe(student))
    run(student, noise(3))
    assert {row.name: (row.special, row.activation.bits) for row in modiff.describe(student)} == {
        "conv_in": ("", 4),
        "time": ("vector", 8),
        "conv_out": ("", 4),
    }


def test_what_the_first_evaluation_found_is_saved(tmp_path):
    config = QuantConfig(
        WEIGHT, QuantSpec(4, "sample"), Modulation(), vectors=Special(activation=QuantSpec(8, "sample"))
    )
    student = modiff.quantize(denoiser(), config)
    outputs, _ = run(student, noise(3))
    modiff.save(student, tmp_path / "s")
    loaded = modiff.load(tmp_path / "s", denoiser(1))
    assert {row.special for row in modiff.describe(loaded)} == {"", "vector"}
    again, _ = run(loaded, noise(3))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_held_is_untouched_without_compensation():
    x, y = uneven((2, 6, 4, 4), 1), uneven((2, 6, 4, 4), 1, seed=1)
    held = Held(x.clone(), None, False)
    BACKENDS["simulate"].encode(y, held, quantizer(powers(), y, "conv"))
    assert torch.equal(held.a_hat, y)
