"""The C++ backend: exact sums, the codes of the float definition bit for bit, every shape, layout and kind of state."""

import pytest
import torch
from torch import nn

from modiff.config.quant import QuantSpec
from modiff.kernels import elementwise
from modiff.kernels.accumulate import accumulate
from modiff.kernels.backend import OperatorShape, Quantizer, output_scale
from modiff.kernels.cpp import build
from modiff.kernels.cpp.backend import CppBackend
from modiff.kernels.fused import After, Before
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import activation_partition
from modiff.quantizers.held import Held, Int16Grid
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ operators here")
BACKEND = CppBackend()


@pytest.fixture(params=[1, 3], ids=["one-thread", "threads"])
def threads(request):
    """Everything holds on several threads too."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


pytestmark = [pytestmark, pytest.mark.usefixtures("threads")]


def test_operators_run_on_as_many_threads_as_pytorch(threads):
    assert torch.ops.modiff.cpp_threads() == threads


OPERATORS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear-tokens": (lambda: nn.Linear(64, 133), (2, 5, 64)),
    "linear-long": (lambda: nn.Linear(4608, 3), (1, 4608)),
    "linear-vector": (lambda: nn.Linear(20, 70), (20,)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (1, 3, 7, 5)),
    "conv2d-even": (lambda: nn.Conv2d(5, 4, 2, stride=2), (2, 5, 9, 6)),
    "conv2d-wide": (lambda: nn.Conv2d(36, 80, 3, padding=1), (3, 36, 6, 5)),
    "conv2d-strides": (lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (3, 4, 8, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 5, 5)),
    "conv2d-single-sample": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "conv2d-long": (lambda: nn.Conv2d(512, 2, 3, padding=1), (1, 512, 3, 3)),
}


def shape_of(module, weight):
    if isinstance(module, nn.Linear):
        return OperatorShape("linear", module.in_features, module.out_features, weight)
    padding = tuple((p, p) for p in module.padding)
    return OperatorShape(
        "conv", module.in_channels, module.out_channels, weight, module.kernel_size, module.stride, padding,
        module.dilation, (), module.groups,
    )  # fmt: skip


W8 = QuantSpec(8, "channel")


def prepared(module, weight=W8, ones=False):
    quantized = round_nearest(module.weight.detach(), weight)
    packed = PackedWeight.pack(quantized, weight)
    if ones:
        packed = PackedWeight(packed.codes, torch.ones_like(packed.scale), packed.zero_point, packed.shape, weight)
    codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
    return BACKEND.prepare(packed, shape_of(module, weight)), codes, packed


def quantizer_of(module, spec, a, fixed=None, clip=None):
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    batched = a.ndim > (1 if kind == "linear" else len(module.kernel_size) + 1)
    partition = activation_partition(spec, a.ndim, kind, batched)
    return Quantizer(spec, partition, Limits.of(spec, a, clip, fixed is not None), fixed)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("weight", [QuantSpec(8, "channel"), QuantSpec(7, symmetric=False)])
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("extreme", [False, True])
def test_invariant_4_sums_are_exact(name, weight, bits, extreme):
    torch.manual_seed(0)
    make, shape = OPERATORS[name]
    module = make()
    if extreme:  # the largest sums that there are
        module.weight.data = torch.full_like(module.weight, 1.0)
    spec = QuantSpec(bits, "sample")
    weights, weight_codes, _ = prepared(module, weight, ones=True)
    quantizer = quantizer_of(module, spec, torch.zeros(shape))
    if BACKEND.obstacle(weights.shape, quantizer, torch.device("cpu"), torch.float32):
        pytest.skip("8-bit codes are not exact here")
    span = spec.code_range[1]
    codes = torch.full(shape, span) if extreme else torch.randint(-span, span + 1, shape)
    # Whole numbers up to the span have scale 1 when the span is among them.
    codes.view(-1)[0] = span
    quantizer = quantizer_of(module, QuantSpec(bits, "tensor"), codes.float())
    encoded = BACKEND.encode(codes.float(), None, quantizer)
    assert torch.equal(encoded.codes.int() - encoded.zero, codes.int())
    assert torch.equal(BACKEND.multiply(weights, encoded), accumulate(codes, weight_codes, weights.shape).float())


GRANULARITIES = {"linear": ("tensor", "sample", "token"), "conv": ("tensor", "sample")}


def definition(a, held, quantizer, zero):
    """The float definition."""
    return elementwise.encode(a, held, quantizer.limits, quantizer.partition, quantizer.fixed, zero)


def held_of(a, int16, compensates=True):
    grid = None
    if int16:
        grid = Int16Grid.like(a)
        held = Held(torch.empty_like(a, dtype=torch.int16), grid, compensates)
        held.hold(a)
        return held
    return Held(a.clone(), None, compensates)


def copy_of(held):
    grid = None if held.grid is None else Int16Grid(*(t.clone() for t in held.grid))
    return Held(held.a_hat.clone(), grid, held.compensates)


@pytest.mark.parametrize("name", ["linear", "linear-tokens", "linear-vector", "conv1d", "conv2d-wide", "conv2d-groups"])
@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("compensates", [True, False])
def test_codes_and_state_are_the_definitions_bit_for_bit(name, int16, symmetric, fixed, compensates):
    torch.manual_seed(1)
    make, shape = OPERATORS[name]
    module = make()
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    for granularity in GRANULARITIES[kind]:
        if granularity == "token" and fixed:
            continue
        spec = QuantSpec(6, granularity, symmetric=symmetric, clip=0.9)
        mine = held_of(torch.randn(shape), int16, compensates)
        theirs = copy_of(mine)
        scale = (torch.tensor(0.03), None if symmetric else torch.tensor(17.0)) if fixed else None
        for step in range(3):
            a = torch.randn(shape) * (1 + step)
            quantizer = quantizer_of(module, spec, a, scale)
            found = BACKEND.encode(a, mine, quantizer)
            codes, wanted, _ = definition(a, theirs, quantizer, found.zero)
            assert torch.equal(found.codes, codes)
            assert torch.equal(found.scale.expand_as(a), wanted.expand_as(a))
            if int16:
                assert torch.equal(mine.a_hat, theirs.a_hat)
            else:  # sums of floats may be rounded once or twice
                torch.testing.assert_close(mine.a_hat, theirs.a_hat, rtol=1e-6, atol=1e-6)
                mine.a_hat.copy_(theirs.a_hat)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_one_call_is_the_three_in_turn_bit_for_bit(name, layout):
    torch.manual_seed(2)
    make, shape = OPERATORS[name]
    module = make()
    weights, _, packed = prepared(module)
    module.weight.data = packed.unpack().dequantize()

    def laid_out(x):
        if layout == "strided":
            return torch.stack([x, x], -1)[..., 0]
        return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.ndim == 4 else x

    a = torch.randn(shape)
    spec = QuantSpec(6, "sample")
    states = [held_of(laid_out(a).clone(), False) for _ in range(2)]
    o_hat = laid_out(module(a).detach())
    outputs = [o_hat.clone(), o_hat.clone()]
    for _ in range(3):
        a = laid_out(a + 0.1 * torch.randn(shape))
        quantizer = quantizer_of(module, spec, a)
        encoded = BACKEND.encode(a, states[0], quantizer)
        in_turn = BACKEND.update(BACKEND.multiply(weights, encoded), encoded, outputs[0])
        at_once, probe = BACKEND.advance(a, states[1], weights, quantizer, outputs[1])
        assert torch.equal(at_once, in_turn)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(states[0].a_hat, states[1].a_hat)
        assert torch.isfinite(probe)
    torch.testing.assert_close(outputs[1], module(states[1].a_hat).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize("fixed", [None, (torch.tensor(0.1), None)])
def test_the_probe_says_that_an_input_is_not_finite(bad, int16, fixed):
    module = nn.Linear(37, 5)
    weights, _, _ = prepared(module)
    for place in (0, 36, 40, 73):
        a = torch.randn(2, 37)
        held = held_of(a, int16)
        a.view(-1)[place] = bad
        quantizer = quantizer_of(module, QuantSpec(7, "sample"), a, fixed)
        _, probe = BACKEND.advance(a, held, weights, quantizer, torch.zeros(2, 5))
        assert not torch.isfinite(probe)


def test_states_in_half_precision_are_rounded_once():
    torch.manual_seed(3)
    module = nn.Conv2d(4, 6, 3, padding=1)
    weights, _, _ = prepared(module)
    a = torch.randn(2, 4, 5, 5)
    for dtype in (torch.float16, torch.bfloat16):
        held = held_of(torch.zeros_like(a), False)
        exact, rounded = torch.zeros(2, 6, 5, 5), torch.zeros(2, 6, 5, 5, dtype=dtype)
        quantizer = quantizer_of(module, QuantSpec(7, "sample"), a)
        wanted, _ = BACKEND.advance(a, copy_of(held), weights, quantizer, exact)
        found, _ = BACKEND.advance(a, copy_of(held), weights, quantizer, rounded)
        assert torch.equal(found, wanted)
        assert torch.equal(rounded, wanted.to(dtype))


@pytest.mark.parametrize("name", [name for name in OPERATORS if "groups" not in name and "depthwise" not in name])
@pytest.mark.parametrize("fixed", [False, True])
def test_asymmetric_codes_of_8_bits_keep_their_zero_point_and_sums_are_exact(name, fixed):
    torch.manual_seed(3)
    make, shape = OPERATORS[name]
    module = make()
    weights, weight_codes, _ = prepared(module, ones=True)
    kind = "linear" if isinstance(module, nn.Linear) else "conv"
    for granularity in GRANULARITIES[kind]:
        if granularity == "token" and fixed:
            continue
        a = torch.randn(shape) + torch.randn(shape[0], *[1] * (len(shape) - 1))  # a zero point of its own for each
        scale = (torch.tensor(0.02), torch.tensor(77.0)) if fixed else None
        quantizer = quantizer_of(module, QuantSpec(8, granularity, symmetric=False), a, scale)
        if BACKEND.obstacle(weights.shape, quantizer, torch.device("cpu"), torch.float32):
            pytest.skip("the products are oneDNN's here")
        encoded = BACKEND.encode(a, None, quantizer)
        defined = elementwise.encode_keeping_zero(a, None, quantizer)
        assert torch.equal(encoded.codes, defined.codes)
        assert torch.equal(encoded.scale.expand_as(a), defined.scale.expand_as(a))
        assert torch.equal(encoded.zero.expand_as(a), torch.as_tensor(defined.zero).float().expand_as(a))
        less_zero = encoded.codes.int() - torch.as_tensor(encoded.zero).int()
        assert less_zero.min() < 0 < less_zero.max()
        sums = accumulate(less_zero, weight_codes, weights.shape).float()
        assert torch.equal(BACKEND.multiply(weights, encoded), sums)
        bias = torch.arange(float(weights.shape.out_channels))
        at_once, probe = BACKEND.apply(a, weights, quantizer, bias)
        added = bias if kind == "linear" else bias.view(-1, *[1] * len(weights.shape.kernel))
        in_turn = sums * output_scale(encoded.scale, sums) + added
        torch.testing.assert_close(at_once, in_turn, rtol=1e-6, atol=1e-5)
        assert torch.isfinite(probe)


def test_symmetric_products_refuse_codes_that_keep_their_zero_point():
    module = nn.Conv2d(8, 12, 3, padding=1, groups=4)
    quantizer = quantizer_of(module, QuantSpec(8, "sample", symmetric=False), torch.zeros(2, 8, 6, 6))
    found = BACKEND.obstacle(shape_of(module, W8), quantizer, torch.device("cpu"), torch.float32)
    assert "asymmetric 8-bit codes less their zero point need 9 bits" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int16", [False, True])
def test_a_gated_input_is_the_first_half_times_gelu_of_the_second(dtype, int16):
    torch.manual_seed(4)
    module = nn.Linear(37, 5)
    weights, _, _ = prepared(module)
    x = torch.randn(2, 3, 74).to(dtype)
    value, gate = x.float().chunk(2, dim=-1)
    a = value * nn.functional.gelu(gate)
    states = [held_of(torch.zeros_like(a) + 0.5 * a, int16) for _ in range(2)]
    outputs = [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)]
    quantizer = quantizer_of(module, QuantSpec(7, "sample"), a)
    gated = Before(activation="geglu")
    assert gated.input(x).shape == a.shape
    BACKEND.advance(a, states[0], weights, quantizer, outputs[0])
    BACKEND.advance_fused(x, states[1], weights, quantizer, outputs[1], gated, After())
    # GELU is rounded otherwise, so that a code may differ by one.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="a gated input is a Linear's, and has two halves"):
        BACKEND.advance_fused(x[..., :73], states[1], weights, quantizer, outputs[1], gated, After())
