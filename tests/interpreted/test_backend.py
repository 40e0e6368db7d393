"""The Triton backend in the interpreter, against the float backend's numbers and the sums of ``kernels.accumulate``."""

from __future__ import annotations

import copy

import pytest
import torch
from selection import crossed
from torch import Tensor, nn

from modiff.config.quant import Modulation, QuantSpec
from modiff.kernels import accumulate
from modiff.kernels.backend import BACKENDS, Held, Int16Grid, Prepared, Quantizer
from modiff.operators.adapters import find_adapter
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import activation_partition
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest

TRITON, FLOAT = BACKENDS["triton"], BACKENDS["simulate"]
WEIGHT = QuantSpec(8, granularity="channel")
CASES = {
    "linear": (nn.Linear(48, 32), (3, 5, 48)),
    "vector": (nn.Linear(64, 32), (2, 64)),
    "one row": (nn.Linear(64, 32), (64,)),
    "3x3": (nn.Conv2d(48, 32, 3, padding=1), (2, 48, 5, 4)),
    "3x3, batch of 1, odd size": (nn.Conv2d(32, 16, 3, padding=1), (1, 32, 7, 5)),
    "3x3, one image without a batch": (nn.Conv2d(32, 16, 3, padding=1), (32, 3, 4)),
    "3x3, stride 2": (nn.Conv2d(32, 16, 3, stride=2, padding=1), (2, 32, 6, 5)),
    "3x3, no border": (nn.Conv2d(32, 16, 3, stride=2), (2, 32, 7, 7)),
    "1x1": (nn.Conv2d(64, 16, 1), (2, 64, 3, 3)),
    "5x1": (nn.Conv2d(32, 16, (5, 1), padding=(2, 0)), (2, 32, 6, 3)),
    "Conv1d": (nn.Conv1d(32, 16, 3, padding=1), (2, 32, 9)),
}
EIGHT = QuantSpec(8, granularity="sample")
ASYMMETRIC = QuantSpec(4, granularity="sample", symmetric=False, clip=0.9)


def quantizer_for(module: nn.Module, a: Tensor, spec: QuantSpec) -> Quantizer:
    adapter = find_adapter(module)
    shape = adapter.shape(module, WEIGHT)
    partition = activation_partition(spec, a.ndim, shape.kind, shape.is_batched(a.ndim))
    return Quantizer(spec, partition, Limits.of(spec, a), modulation=Modulation())


def weights_for(module: nn.Module) -> tuple[PackedWeight, Prepared, Prepared]:
    shape = find_adapter(module).shape(module, WEIGHT)
    packed = PackedWeight.pack(round_nearest(module.weight.detach(), WEIGHT), WEIGHT)
    return packed, TRITON.prepare(packed, shape), FLOAT.prepare(packed, shape)


def held_near(a: Tensor, int16: bool) -> Held:
    grid = Int16Grid.like(a) if int16 else None
    held = Held(torch.empty_like(a, dtype=torch.int16 if int16 else a.dtype), grid)
    held.hold(a + torch.randn_like(a) / 20)
    return held


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FEW = ("vector", "3x3", "3x3, stride 2", "Conv1d")


@pytest.mark.parametrize(
    ("case", "int16", "spec"),
    crossed(
        [list(CASES), (False, True), (EIGHT, ASYMMETRIC)],
        lambda case, int16, spec: int16 == (spec is ASYMMETRIC) and (case in FEW or not int16),
    ),
)
@torch.no_grad()
def test_an_evaluation_is_the_definitions(case: str, int16: bool, spec: QuantSpec) -> None:
    module, size = CASES[case]
    a = torch.randn(size)
    quantizer, (packed, prepared, values) = quantizer_for(module, a, spec), weights_for(module)
    held = held_near(a, int16)
    other, apart = copy.deepcopy(held), copy.deepcopy(held)
    o_hat = module(held.value())
    if a.ndim == 4 and prepared.layout is not None:
        o_hat = o_hat.contiguous(memory_format=prepared.layout)
    expected_o, before = o_hat.clone(), o_hat.clone()
    output, probe = TRITON.advance(a, held, prepared, quantizer, o_hat)
    expected, _ = FLOAT.advance(a, other, values, quantizer, expected_o)
    torch.testing.assert_close(held.value(), other.value(), rtol=0, atol=1e-6)  # the definition may fuse its sum
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(o_hat, output)
    assert probe == 0
    # The three steps give the same as the one, and their sums are exact.
    encoded = TRITON.encode(a, apart, quantizer)
    assert torch.equal(apart.a_hat, held.a_hat)
    product = TRITON.multiply(prepared, encoded)
    weight = packed.unpack().codes
    sums = accumulate(encoded.codes, weight, prepared.shape)
    scale = packed.scale.reshape(-1 if module.weight.ndim == 2 else [-1, *[1] * (module.weight.ndim - 2)])
    assert torch.equal(product, sums.float() * scale)
    assert torch.equal(TRITON.update(product, encoded, before), output)


@pytest.mark.parametrize("spec", [QuantSpec(8, granularity="token"), QuantSpec(6, granularity="tensor")])
@torch.no_grad()
def test_other_granularities(spec: QuantSpec) -> None:
    module, size = CASES["linear"]
    a = torch.randn(size)
    quantizer, (_, prepared, values) = quantizer_for(module, a, spec), weights_for(module)
    held = held_near(a, int16=False)
    other, o_hat = copy.deepcopy(held), module(held.value())
    expected = FLOAT.advance(a, other, values, quantizer, o_hat.clone())[0]
    torch.testing.assert_close(TRITON.advance(a, held, prepared, quantizer, o_hat)[0], expected, rtol=1e-5, atol=1e-5)
    codes = TRITON.encode(a, None, quantizer)
    values = FLOAT.encode(a, None, quantizer).codes
    torch.testing.assert_close(codes.codes * codes.scale, values, rtol=0, atol=1e-6)


POWERS = QuantSpec(4, "sample_channel", symmetric=False, clip=0.9, scales="power_of_two")
FOLLOWING = QuantSpec(6, granularity="sample", range="previous")


@pytest.mark.parametrize(
    ("case", "int16"),
    crossed(
        [["linear", "vector", "3x3", "3x3, one image without a batch", "Conv1d"], (False, True)],
        lambda case, int16: int16 == (case == "3x3"),
    ),
)
@torch.no_grad()
def test_scales_in_powers_of_two(case: str, int16: bool) -> None:
    """One pass of the operator, and its three steps, for channels that differ a thousand times."""
    module, size = CASES[case]
    a = torch.randn(size)
    quantizer, (packed, prepared, values) = quantizer_for(module, a, POWERS), weights_for(module)
    channel = a.ndim - 1 if isinstance(module, nn.Linear) else a.ndim - 1 - len(prepared.shape.kernel)
    sizes = [1] * a.ndim
    sizes[channel] = -1
    held = held_near(a, int16)
    a = a + 10.0 ** -torch.linspace(0, 3, a.shape[channel]).view(sizes) * torch.randn(size)
    other, apart = copy.deepcopy(held), copy.deepcopy(held)
    o_hat = module(held.value())
    if a.ndim == 4 and prepared.layout is not None:
        o_hat = o_hat.contiguous(memory_format=prepared.layout)
    expected = FLOAT.advance(a, other, values, quantizer, o_hat.clone())[0]
    output, probe = TRITON.advance(a, held, prepared, quantizer, o_hat)
    torch.testing.assert_close(held.value(), other.value(), rtol=0, atol=1e-6)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert probe == 0
    encoded = TRITON.encode(a, apart, quantizer)
    assert torch.equal(apart.a_hat, held.a_hat)
    assert encoded.codes.shape == a.shape
    assert quantizer.partition.shared is None or encoded.codes.abs().max() > 15  # shifted within the container
    product = TRITON.multiply(prepared, encoded)
    sums = accumulate(encoded.codes, packed.unpack().codes, prepared.shape)
    scale = packed.scale.reshape(-1 if module.weight.ndim == 2 else [-1, *[1] * (module.weight.ndim - 2)])
    assert torch.equal(product, sums.float() * scale)


@pytest.mark.parametrize("int16", [False, True], ids=["float", "int16"])
@torch.no_grad()
def test_the_range_of_the_evaluation_before(int16: bool) -> None:
    """Some evaluations, of which one outgrows the margin, are the definition's."""
    module, size = CASES["3x3"]
    a = torch.randn(size)
    quantizer, (_, prepared, values) = quantizer_for(module, a, FOLLOWING), weights_for(module)
    held = held_near(a, int16)
    held.last = torch.zeros(3, size[0], 1, 1, 1)
    other = copy.deepcopy(held)
    o_hat = module(held.value()).contiguous(memory_format=torch.channels_last)
    expected_o = o_hat.clone()
    for change in (0.1, 0.1, 0.5, 0.08):
        a = a + change * torch.randn(size)
        output = TRITON.advance(a, held, prepared, quantizer, o_hat)[0]
        expected = FLOAT.advance(a, other, values, quantizer, expected_o)[0]
        torch.testing.assert_close(held.value(), other.value(), rtol=0, atol=1e-5)
        torch.testing.assert_close(held.last, other.last, rtol=0, atol=1e-5)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [EIGHT, QuantSpec(8, granularity="token"), POWERS, QuantSpec(6, granularity="tensor")])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_tokens_that_are_the_pixels_of_an_image(spec: QuantSpec, shared: bool) -> None:
    """Their channels lie apart, as attention's do, or in no order that the kernels read: the state must move anyway."""
    module = CASES["linear"][0]
    for size, order in (((3, 48, 5), (0, 2, 1)), ((2, 3, 2, 48), (0, 2, 1, 3))):
        a = torch.randn(size).permute(order)
        quantizer, (_, prepared, values) = quantizer_for(module, a, spec), weights_for(module)
        held = held_near(a, int16=False)
        assert not held.a_hat.is_contiguous()
        other, before, o_hat = copy.deepcopy(held), held.a_hat.clone(), module(held.value()).contiguous()
        expected = FLOAT.advance(a, other, values, quantizer, o_hat.clone())[0]
        if shared:
            output = TRITON.multiply_into(prepared, TRITON.encode(a, held, quantizer), o_hat)
        else:
            output = TRITON.advance(a, held, prepared, quantizer, o_hat)[0]
        torch.testing.assert_close(held.a_hat, other.a_hat, rtol=0, atol=1e-6)
        assert not torch.equal(held.a_hat, before)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [QuantSpec(8, granularity="sample"), ASYMMETRIC])
@pytest.mark.parametrize("int16", [False, True], ids=["float", "int16"])
@torch.no_grad()
def test_calibrated_scales(spec: QuantSpec, int16: bool) -> None:
    module, size = CASES["3x3"]
    a = torch.randn(size)
    fixed = (torch.full((1, 1, 1, 1), 0.004), None if spec.symmetric else torch.full((1, 1, 1, 1), 6.0))
    quantizer = quantizer_for(module, a, spec)
    quantizer = Quantizer(spec, quantizer.partition, Limits.of(spec, a, fixed=True), fixed)
    _, prepared, values = weights_for(module)
    held = held_near(a, int16)
    other, o_hat = copy.deepcopy(held), module(held.value()).contiguous(memory_format=torch.channels_last)
    expected = FLOAT.advance(a, other, values, quantizer, o_hat.clone())[0]
    torch.testing.assert_close(TRITON.advance(a, held, prepared, quantizer, o_hat)[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(held.value(), other.value(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_every_layout_of_input_state_and_output() -> None:
    module, size = CASES["3x3"]
    a = torch.randn(size)
    quantizer, (_, prepared, _) = quantizer_for(module, a, QuantSpec(8, granularity="sample")), weights_for(module)
    held = held_near(a, int16=False)
    o_hat, found = module(held.value()), []
    last = {"memory_format": torch.channels_last}
    for layout_a, layout_held, layout_o in ((last, last, last), ({}, last, last), (last, {}, last), (last, last, {})):
        state = Held(held.a_hat.clone().contiguous(**layout_held))
        output = o_hat.clone().contiguous(**layout_o)
        found.append(TRITON.advance(a.clone().contiguous(**layout_a), state, prepared, quantizer, output)[0])
        assert torch.equal(output, found[-1])
    view = torch.randn(2, 4, 48, 10)[:, :, :, ::2].transpose(1, 2)  # neither of the usual layouts
    view.copy_(a.transpose(2, 3).reshape(view.shape) if view.shape != a.shape else a)
    assert all(torch.equal(each, found[0]) for each in found)


def test_the_fakes_know_the_shapes() -> None:
    """PyTorch's own check of an operator: schema, fakes, and what ``torch.compile`` may assume."""
    module, size = CASES["3x3, stride 2"]
    a = torch.randn(size)
    _, prepared, _ = weights_for(module)
    image = a.permute(0, 2, 3, 1)
    tests = ("test_schema", "test_faketensor")
    tail = (1, [1, 1, 1, 1], 32, 127, 1.0, True, False, True)
    arguments = (image, image.clone(), None, None, None, None, None, *tail)
    torch.library.opcheck(torch.ops.modiff.triton_quantize.default, arguments, test_utils=tests)
    last = torch.ones(3, 2)
    norm = (0, 1.25, 4, 1e-5, torch.ones(32), torch.zeros(32), torch.randn(2, 32), "silu")
    normed = (image, image.clone(), None, None, None, None, last, *tail, *norm)
    torch.library.opcheck(torch.ops.modiff.triton_quantize.default, normed, test_utils=tests)
    codes = torch.ops.modiff.triton_quantize(*arguments)[0]
    weight = prepared.weight
    torch.library.opcheck(
        torch.ops.modiff.triton_product.default,
        (codes, weight.codes, weight.scale, None, None, 2, 16),
        test_utils=tests,
    )
    o_hat = torch.randn(2, 3, 3, 16)
    torch.library.opcheck(
        torch.ops.modiff.triton_product_.default,
        (o_hat, codes, weight.codes, weight.scale, torch.ones(2), 2),
        test_utils=tests,
    )


def test_a_layout_that_the_kernels_cannot_read_is_refused() -> None:
    from modiff.kernels.triton import launch

    with pytest.raises(ValueError, match="neither of its usual layouts"):
        launch.strides(torch.zeros(2, 4, 6, 8).transpose(1, 2))
