"""``range: previous``: scales from the residual of the evaluation before, with the evaluation's own as the fallback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import denoiser, drift, noise, run
from torch import nn

import modiff
from modiff.config import Modulation, QuantConfig, QuantSpec, Rule, Special
from modiff.errors import ConfigError
from modiff.kernels.backend import BACKENDS
from modiff.operators.reference import ReferenceOperator
from modiff.quantizers.affine import Limits
from modiff.quantizers.held import Held

WEIGHT = QuantSpec(8, "channel")
SPEC = QuantSpec(6, "sample", range="previous")


def settings(spec=SPEC, **modulation):
    return QuantConfig(WEIGHT, spec, Modulation(**modulation))


@pytest.mark.parametrize("granularity", ["sample", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("modulation", [{}, {"warmup": "refine"}, {"refresh_every": 3}])
def test_a_trajectory_is_the_references(granularity, symmetric, modulation):
    torch.manual_seed(0)
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    spec = replace(SPEC, granularity=granularity, symmetric=symmetric, clip=0.9)
    reference = ReferenceOperator(module, WEIGHT, spec, Modulation(**modulation))
    student = modiff.quantize(nn.Sequential(module), settings(spec, **modulation))
    inputs = drift((2, 6, 5, 5), 6)
    inputs[4] = inputs[4] * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)  # the second image outgrows its last range
    with modiff.trajectory(student):
        for x in inputs:
            expected = reference.evaluate(x)
            # Float32 residuals lie next to a rounding boundary now and then; float64 ones do not lie there too.
            assert (student(x).double() - expected).norm() / expected.norm() < 5e-3


def limits(symmetric=True):
    return Limits.of(replace(SPEC, symmetric=symmetric), torch.zeros(1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_sample_falls_back_by_itself(symmetric):
    low, high = torch.tensor([[-1.0], [-1.0], [-1.0]]), torch.tensor([[0.5], [0.5], [0.5]])
    last = torch.stack([low, high, torch.ones_like(low)])
    last[:2, 1] *= 0.5  # too small, even with the margin
    last[:, 2] = 0.0  # there is none
    numbers = limits(symmetric)
    scale, zero_point = numbers.scale_after(low, high, last, None)
    own, own_zero = numbers.scale(low, high)
    assert torch.equal(scale[1:], own[1:])
    torch.testing.assert_close(scale[0], own[0] * SPEC.margin)
    assert torch.equal(last, torch.stack([low, high, torch.ones_like(low)]))
    assert symmetric or torch.equal(zero_point, own_zero)


@pytest.mark.parametrize("backend", ["simulate", "onednn"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_never_clip_beyond_those_of_an_own_range(backend, bits):
    """What is left of the residual is at most half a step, whatever the evaluation before was."""
    spec = replace(SPEC, bits=bits)
    student = modiff.quantize(nn.Sequential(nn.Linear(8, 4)), replace(settings(spec), backend=backend))
    quantizer = student[0].execution(torch.zeros(3, 5, 8)).quantizer
    held = Held(torch.zeros(3, 5, 8), last=torch.zeros(3, 3, 1, 1))
    for size in (1.0, 1.01, 0.2, 7.0, 7.5, 0.0, 3.0):
        a = held.a_hat + size * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
        before = (a - held.a_hat).abs().amax((1, 2), keepdim=True)
        BACKENDS[backend].encode(a, held, quantizer)
        step = before.maximum(held.last[1].abs()) * spec.margin / spec.code_range[1]
        assert ((a - held.a_hat).abs() <= 0.501 * step.clamp(min=1e-6)).all() or size == 0.2
        torch.testing.assert_close(held.last[0].abs().maximum(held.last[1]), before)


def test_an_image_does_not_depend_on_the_others_or_on_the_last_trajectory():
    student = modiff.quantize(denoiser(), settings())
    inputs = noise(5)
    both, _ = run(student, inputs)
    again, _ = run(student, inputs)
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    alone, _ = run(student, [[x[:1] for x in arguments] for arguments in inputs])
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-4, atol=1e-4)
    wider = [torch.cat([both[-1][:1], both[-1][:1] * 0])]
    assert wider[0].shape[0] == 2
    dynamic, _ = run(modiff.quantize(denoiser(), settings(replace(SPEC, range="dynamic"))), inputs)
    assert torch.equal(dynamic[1], both[1])  # the first quantized evaluation has no evaluation before
    assert not torch.equal(dynamic[-1], both[-1])


def test_an_int16_reconstruction_moves_exactly():
    torch.manual_seed(0)
    module = nn.Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    student = modiff.quantize(nn.Sequential(module), settings(reconstruction_dtype="int16"))
    with modiff.trajectory(student) as trajectory:
        for x in drift((2, 6, 5, 5), 6):
            output = student(x)
        held = next(iter(trajectory.caches.values()))[0].held
        expected = nn.functional.conv2d(held.value(), student[0].quantized_weight(), module.bias, padding=1)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)  # the invariant


def test_saved_and_described_as_it_is(tmp_path):
    student = modiff.quantize(denoiser(), settings())
    assert "6 bit, sample, symmetric, range of the evaluation before" in str(modiff.describe(student))
    outputs, _ = run(student, noise(4))
    modiff.save(student, tmp_path / "s")
    again, _ = run(modiff.load(tmp_path / "s", denoiser()), noise(4))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_guidance_that_ends_keeps_the_ranges_of_the_rows_that_stay():
    student = modiff.quantize(denoiser(), settings())
    inputs = noise(5)
    with modiff.trajectory(student, guidance_may_end=True):
        for k, arguments in enumerate(inputs):
            rows = [torch.cat([x, x]) for x in arguments] if k < 3 else arguments
            found = student(*rows)
    expected, _ = run(student, inputs)
    torch.testing.assert_close(found, expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["stages", pytest.param("whole", marks=pytest.mark.slow)])
def test_graphs_give_the_same(mode):
    expected, _ = run(modiff.quantize(denoiser(), settings()), noise(4))
    found, _ = run(modiff.compile(modiff.quantize(denoiser(), settings()), mode), noise(4))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": "token"}, "range is 'previous' with granularity 'token'; allowed are tensor and sample"),
        ({"timestep_buckets": 4}, "timestep_buckets is 4, but range is 'previous', which is new in every evaluation"),
        ({"range": "last"}, "range is 'last'; allowed are dynamic, previous, calibrated"),
    ],
)
def test_what_a_spec_cannot_be_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SPEC, **change)


def test_weights_and_operators_without_a_past_are_refused():
    with pytest.raises(ConfigError, match="weight range is 'previous'; a weight's range is its own"):
        QuantConfig(replace(SPEC, granularity="tensor"))
    with pytest.raises(ConfigError, match="'conv_in' .*: range is 'previous', but the operator is not modulated"):
        modiff.quantize(denoiser(), QuantConfig(WEIGHT, SPEC, None))
    rule = Rule("conv_out", modulation=Modulation(error_compensation=False))
    with pytest.raises(ConfigError, match="'conv_out' .*: range 'previous' needs error_compensation"):
        modiff.quantize(denoiser(), replace(settings(), rules=(rule,)))
    plain = QuantConfig(WEIGHT, QuantSpec(8, "sample"), None, vectors=Special(activation=SPEC))
    with pytest.raises(ConfigError, match="range is 'previous', but the operator is not modulated"):
        modiff.quantize(denoiser(), plain)


def test_the_cpp_operators_say_why_they_do_not():
    pytest.importorskip("modiff.kernels.cpp.backend")
    student = modiff.quantize(denoiser(), settings())
    operator = student.conv_in
    how = operator.execution(torch.zeros(1, operator.shape.in_channels, 4, 4)).quantizer
    found = BACKENDS["cpp"].obstacle(operator.shape, how, torch.device("cpu"), torch.float32)
    assert found == "the C++ operators take no range of the evaluation before"
