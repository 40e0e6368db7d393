"""Properties of the quantizers, for any tensor."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from modiff.config.quant import QuantSpec
from modiff.kernels.backend import BACKENDS, Quantizer
from modiff.operators import reference
from modiff.quantizers.affine import Limits, dequantize, fake_quantize, quantize, scale_from_range
from modiff.quantizers.granularity import Partition, activation_partition, weight_partition
from modiff.quantizers.rounding import round_nearest

LINEAR, CONV = nn.Linear(1, 1), nn.Conv2d(1, 1, 1)
BITS = range(2, 9)
ACTIVATIONS = ["tensor", "sample", "channel", "sample_channel", "token", "group"]
settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("fast")


def fake_quantize_(x, partition, spec):
    """What the float backend multiplies, in place; returns the probe."""
    encoded = BACKENDS["simulate"].encode(x, None, Quantizer(spec, partition, Limits.of(spec, x)))
    x.copy_(encoded.codes)
    return encoded.probe


@st.composite
def tensors(draw, min_dims=1, max_dims=4):
    """Any shape and layout, magnitudes from 1e-30 to 1e30, with zeros, constants and offsets among them."""
    shape = draw(st.lists(st.integers(1, 5), min_size=min_dims, max_size=max_dims))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["normal", "uniform", "constant", "zeros", "sparse", "positive"]))
    x = torch.randn(shape, generator=generator)
    if kind == "uniform":
        x = torch.rand(shape, generator=generator) * 2 - 1
    elif kind == "constant":
        x = torch.full(shape, float(x.flatten()[0]))
    elif kind == "zeros":
        x = torch.zeros(shape)
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=generator) < 0.3)
    elif kind == "positive":
        x = x.abs() + 3
    x = x * 10.0 ** draw(st.integers(-30, 30))
    return x.transpose(0, -1) if draw(st.booleans()) else x


@st.composite
def specs(draw, granularities=ACTIVATIONS):
    granularity = draw(st.sampled_from(granularities))
    return QuantSpec(
        bits=draw(st.integers(2, 8)),
        granularity=granularity,
        symmetric=draw(st.booleans()),
        clip=draw(st.sampled_from([1.0, 1.0, 0.8, 0.5])),
        group_size=draw(st.integers(1, 7)) if granularity == "group" else None,
    )


def partition_of(x, spec, kind="linear"):
    return activation_partition(spec, x.ndim, kind, batched=x.ndim > 1)


@given(tensors(), specs())
def test_in_place_kernel_equals_the_definition_exactly(x, spec):
    partition = partition_of(x, spec)
    expected = fake_quantize(x, partition, spec)
    low, high = partition.range(x.clone())
    y = x.clone()
    probe = fake_quantize_(y, partition, spec)
    assert torch.equal(y, expected)
    assert torch.equal(probe, (high - low).sum())


@given(tensors(min_dims=2), specs())
def test_every_granularity_agrees_with_the_reference(x, spec):
    x = x.double()
    labels = reference.activation_labels(x.shape, spec, LINEAR)
    expected = reference.quantize(x, labels, spec, spec.clip)
    torch.testing.assert_close(fake_quantize(x, partition_of(x, spec), spec), expected, rtol=1e-12, atol=0)


@given(tensors(min_dims=4), specs([g for g in ACTIVATIONS if g != "token"]), st.booleans())
def test_every_granularity_of_convolutions_agrees_with_the_reference(x, spec, channels_last):
    x = x.double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    labels = reference.activation_labels(x.shape, spec, CONV)
    expected = reference.quantize(x, labels, spec, spec.clip)
    found = fake_quantize(x, partition_of(x, spec, "conv"), spec)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.equal(found, fake_quantize(x.contiguous(), partition_of(x, spec, "conv"), spec))


@given(tensors(min_dims=2), specs(["tensor", "channel", "group"]))
def test_weights_agree_with_the_reference_and_count_their_scales(weight, spec):
    weight = weight.double()
    labels = reference.weight_labels(weight.shape, spec)
    found = round_nearest(weight, spec)
    expected = reference.quantize(weight, labels, spec, spec.clip)
    torch.testing.assert_close(found.dequantize(), expected, rtol=1e-12, atol=0)
    assert found.num_scales == labels.unique().numel()
    assert found.codes.min() >= spec.code_range[0]
    assert found.codes.max() <= spec.code_range[1]
    assert torch.equal(found.codes, found.codes.round())


@given(tensors(), specs())
def test_error_is_at_most_half_a_scale_inside_the_range(x, spec):
    partition = partition_of(x, spec)
    low, high = partition.range(x)
    scale, _ = scale_from_range(low, high, spec)
    error = (fake_quantize(x, partition, spec) - x).abs()
    if spec.symmetric:
        bottom, top = -torch.maximum(-low, high) * spec.clip, torch.maximum(-low, high) * spec.clip
    else:
        bottom, top = low.clamp(max=0) * spec.clip, high.clamp(min=0) * spec.clip
    inside = (x >= partition.expand(bottom, x.shape)) & (x <= partition.expand(top, x.shape))
    # Half a scale, and the float rounding of x / scale with up to 255 codes.
    bound = partition.expand(scale, x.shape) * (0.5 + 256 * torch.finfo(x.dtype).eps)
    assert (error <= bound)[inside].all()


@given(tensors(), specs())
def test_zero_stays_zero(x, spec):
    x = torch.cat([x.flatten(), torch.zeros(1)])
    spec = QuantSpec(spec.bits, "tensor", spec.symmetric, clip=spec.clip)
    assert fake_quantize(x, Partition(), spec)[-1] == 0


@given(specs(), st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
def test_constant_tensors_survive_and_zeros_stay_zeros(spec, value):
    assume(value != 0)
    x = torch.full((2, 3, 4), value)
    found = fake_quantize(x, partition_of(x, spec), spec)
    # The constant is the end of the range, which is a code. With clip it is the end of the clipped range.
    torch.testing.assert_close(found, x * spec.clip, rtol=1e-6, atol=0)
    zeros = torch.zeros(2, 3, 4)
    assert torch.equal(fake_quantize(zeros, partition_of(zeros, spec), spec), zeros)


@given(tensors(), st.integers(2, 8))
def test_quantizing_twice_changes_nothing_when_symmetric(x, bits):
    spec = QuantSpec(bits, "tensor")
    once = fake_quantize(x, Partition(), spec)
    torch.testing.assert_close(fake_quantize(once, Partition(), spec), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("low", "high", "symmetric"), [(-1, 1, True), (-0.3, 1, False), (0, 5, False), (-4, 0, False)])
def test_all_codes_are_used_on_uniform_data(bits, low, high, symmetric):
    """Trap 5."""
    assert unused_codes(scale_from_range, bits, low, high, symmetric) == set()


def unused_codes(scale_rule, bits, low, high, symmetric):
    spec = QuantSpec(bits, "tensor", symmetric)
    x = torch.linspace(low, high, 4001, dtype=torch.float64)
    scale, zero_point = scale_rule(x.min(), x.max(), spec)
    codes = set(quantize(x, scale, zero_point, spec).tolist())
    return set(range(spec.code_range[0], spec.code_range[1] + 1)) - codes


@pytest.mark.parametrize("bits", BITS)
def test_trap_5_built_in_is_noticed(bits):
    """A symmetric scale of range / (2^bits - 1) with codes -2^(bits-1).. wastes codes; max / (n - 1) as well."""

    def wrong(low, high, spec):
        n = spec.code_range[1]
        scale = (high - low) / (n - 1) if n > 1 else torch.tensor(torch.inf)
        return scale, None

    assert len(unused_codes(wrong, bits, -1, 1, True)) >= (2 if bits == 2 else 2 ** (bits - 1) - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_ranges_become_zeros(dtype):
    """A scale that a device may flush to zero is no scale; the in-place kernel, which skips the clamp, agrees."""
    spec = QuantSpec(4, "tensor")
    x = torch.tensor([10.0, -3.0, 1.0], dtype=dtype) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (x != 0).all()
    y = x.clone()
    fake_quantize_(y, Partition(), spec)
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(fake_quantize(x, Partition(), spec), y)


def test_last_group_may_be_short():
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6, 70]])
    low, high = weight_partition(QuantSpec(8, "group", group_size=3)).range(x)
    assert low.tolist() == [[1, 4, 70]]
    assert high.tolist() == [[3, 6, 70]]
    expanded = Partition((0, 1), 1, 3).expand(high, x.shape)
    assert expanded.tolist() == [[3, 3, 3, 6, 6, 6, 70]]


@pytest.mark.parametrize("granularity", ACTIVATIONS)
def test_empty_batches_pass_through(granularity):
    spec = QuantSpec(4, granularity, group_size=2 if granularity == "group" else None)
    x = torch.empty(0, 6)
    assert torch.isfinite(fake_quantize_(x, partition_of(x, spec), spec))
    assert x.shape == (0, 6)


@pytest.mark.parametrize("granularity", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_and_inf_show_in_the_probe_that_is_returned(granularity, bad, symmetric):
    spec = QuantSpec(4, granularity, symmetric, group_size=2 if granularity == "group" else None)
    x = torch.randn(3, 5, 4)
    x[1, 2, 3] = bad
    assert not torch.isfinite(fake_quantize_(x, partition_of(x, spec), spec))


def test_codes_and_values_of_a_worked_example():
    """The definition by hand: 3 bits asymmetric on -1..6 has scale 1 and zero point 1."""
    spec = QuantSpec(3, "tensor", symmetric=False)
    x = torch.tensor([-1.0, 0.4, 2.5, 3.5, 6.0])
    scale, zero_point = scale_from_range(x.min(), x.max(), spec)
    assert (scale.item(), zero_point.item()) == (1.0, 1.0)
    codes = quantize(x, scale, zero_point, spec)
    assert codes.tolist() == [0, 1, 3, 5, 7]  # 2.5 and 3.5 round to even
    assert dequantize(codes, scale, zero_point).tolist() == [-1, 0, 2, 4, 6]
    scale, zero_point = scale_from_range(x.min(), x.max(), QuantSpec(3, "tensor", clip=0.5))
    assert (scale.item(), zero_point) == (1.0, None)  # .5 x 6 / 3
