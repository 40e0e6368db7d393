"""Integer execution: exact sums, the choice of the backend and its reasons, and students that run in integers."""

import copy
import gc
import re

import pytest
import torch
from small_models import config, denoiser, drift, modulated, noise, run
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import ConfigError
from modiff.kernels import accumulate, onednn, select
from modiff.kernels.backend import BACKENDS, Encoded, Quantizer
from modiff.operators.adapters import find_adapter
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import Partition
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN operators")

OPERATORS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear-tokens": (lambda: nn.Linear(64, 33), (2, 5, 64)),
    "linear-long": (lambda: nn.Linear(4608, 3), (1, 4608)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=2, dilation=2), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (1, 3, 7, 5)),
    "conv2d-even": (lambda: nn.Conv2d(5, 4, 2, stride=2), (2, 5, 9, 6)),
    "conv2d-same": (lambda: nn.Conv2d(4, 4, (3, 1), padding="same"), (2, 4, 5, 4)),
    "conv2d-strides": (lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), (3, 4, 8, 9)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 6, 6)),
    "conv2d-depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (2, 16, 5, 5)),
    "conv2d-single-sample": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "conv2d-long": (lambda: nn.Conv2d(512, 2, 3, padding=1), (1, 512, 3, 3)),
}


def quantizer_of(spec, dtype=torch.float32):
    return Quantizer(spec, Partition(), Limits.of(spec, torch.empty((), dtype=dtype)))


def choose(module, weight, activation, device=CPU, dtype=torch.float32):
    shape = find_adapter(module).shape(module, weight)
    return select.choose("auto", shape, activation and quantizer_of(activation), device, dtype)


def check_sums(module, weight, activation, codes):
    """Products with scales of 1 are the exact sums."""
    backend, quantizer = BACKENDS["onednn"], quantizer_of(activation)
    quantized = round_nearest(module.weight.detach(), weight)
    packed = PackedWeight.pack(quantized, weight)
    ones = PackedWeight(packed.codes, torch.ones_like(packed.scale), packed.zero_point, packed.shape, weight)
    shape = find_adapter(module).shape(module, weight)
    prepared, zero = backend.prepare(ones, shape), backend.zero(quantizer)
    found = backend.multiply(prepared, Encoded((codes + zero).to(torch.uint8), zero, torch.ones(()), torch.zeros(())))
    weight_codes = quantized.codes if quantized.zero_point is None else quantized.codes - quantized.zero_point
    assert torch.equal(found, accumulate(codes, weight_codes, shape).float())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("weight", [QuantSpec(8, "channel"), QuantSpec(4, "tensor"), QuantSpec(7, symmetric=False)])
@pytest.mark.parametrize("activation", [QuantSpec(7, "sample"), QuantSpec(3, "sample"), QuantSpec(6, symmetric=False)])
@pytest.mark.parametrize("extreme", [False, True])
def test_invariant_4_sums_are_exact(name, weight, activation, extreme):
    torch.manual_seed(0)
    make, shape = OPERATORS[name]
    module = make()
    if extreme:  # the largest sums that there are
        module.weight.data = torch.full_like(module.weight, 1.0)
    span = quantizer_of(activation).span
    codes = torch.full(shape, span) if extreme else torch.randint(-span, span + 1, shape)
    check_sums(module, weight, activation, codes)


def test_products_of_8_bit_codes_are_exact_where_they_are_chosen():
    module, weight, activation = nn.Linear(256, 8), QuantSpec(8, "channel"), QuantSpec(8, "sample")
    chosen = choose(module, weight, activation)
    if not onednn.exact_8bit():
        assert chosen.name == "simulate"
        return
    check_sums(module, weight, activation, torch.full((2, 256), 127))


WHY_NOT = [
    (nn.Linear(2, 2), None, QuantSpec(4), "its weights are not quantized"),
    (nn.Linear(2, 2), QuantSpec(8), None, "its activations are not quantized"),
    (nn.Linear(2, 2), QuantSpec(8), QuantSpec(4, "channel"), "scales per channel do not factor out of the sum"),
    (nn.Linear(2, 2), QuantSpec(8, "group", group_size=2), QuantSpec(4), "weight scales per group do not factor out"),
    (nn.Linear(2, 2), QuantSpec(8, symmetric=False), QuantSpec(4), "asymmetric 8-bit weight codes"),
    (
        nn.ConvTranspose2d(2, 2, 2),
        QuantSpec(8),
        QuantSpec(8, symmetric=False),
        "asymmetric 8-bit codes less their zero",
    ),
    (nn.Conv3d(2, 2, 1), QuantSpec(8), QuantSpec(4), "there is no integer Conv3d"),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), QuantSpec(8), QuantSpec(4), "padded by 'circular'"),
    (nn.Conv2d(2, 2, 2, padding="same"), QuantSpec(8), QuantSpec(4), "not the same at both ends"),
]


@pytest.mark.parametrize(("module", "weight", "activation", "reason"), WHY_NOT)
def test_what_cannot_be_exact_is_simulated_and_says_why(module, weight, activation, reason):
    chosen = choose(module, weight, activation)
    assert chosen.name == "simulate"
    assert reason in chosen.reason
    assert reason in str(chosen)


def test_float64_and_other_devices_are_simulated():
    spec = QuantSpec(4)
    assert "float64" in choose(nn.Linear(2, 2), spec, spec, dtype=torch.float64).reason
    assert "not on xpu" in choose(nn.Linear(2, 2), spec, spec, torch.device("xpu")).reason


def test_without_vnni_8_bit_codes_are_refused_and_7_bit_ones_are_not(monkeypatch):
    monkeypatch.setattr(onednn, "exact_8bit", lambda: False)
    weight = QuantSpec(8, "channel")
    for activation in (QuantSpec(8), QuantSpec(7, symmetric=False)):
        assert "saturate" in choose(nn.Linear(2, 2), weight, activation).reason
    for activation in (QuantSpec(7), QuantSpec(6, symmetric=False)):
        assert choose(nn.Linear(2, 2), weight, activation).name == "onednn"


def test_a_backend_asked_for_by_name_says_why_it_cannot_run():
    asked = QuantConfig(QuantSpec(8, "channel"), QuantSpec(4, "channel"), Modulation(), backend="onednn")
    model = denoiser()
    before = {name: type(m) for name, m in model.named_modules()}
    message = "backend 'onednn' cannot run operator 'conv_in' exactly: scales per channel do not factor out of the sum"
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        modiff.quantize(model, asked)
    assert {name: type(m) for name, m in model.named_modules()} == before
    asked = QuantConfig(QuantSpec(8, "channel"), QuantSpec(4, "sample"), Modulation(), backend="onednn")
    assert {row.backend for row in modiff.describe(modiff.quantize(model, asked))} == {"onednn"}


def test_describe_says_which_backend_and_why():
    base = config("w8a6-modiff-paper")
    rules = (Rule("time", activation=None),)
    student = modiff.quantize(denoiser(), QuantConfig(base.weight, base.activation, base.modulation, rules))
    rows = {row.name: row.backend for row in modiff.describe(student)}
    assert rows == {
        "conv_in": "onednn",
        "time": "simulate (its activations are not quantized)",
        "conv_out": "onednn",
    }
    assert "onednn" in str(modiff.describe(student))


class One(nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return self.operator(x)


@pytest.mark.parametrize("preset", ["w8a7-modiff-paper", "w4a4-modiff-paper", "w8a6-ptq-paper", "w3a3-ptq-paper"])
@pytest.mark.parametrize("name", OPERATORS)
def test_integers_agree_with_the_simulation(name, preset):
    make, shape = OPERATORS[name]
    inputs = [(x,) for x in drift(shape, 6)]
    outputs = {}
    for backend in ("onednn", "simulate"):
        torch.manual_seed(0)
        base = QuantConfig.preset(preset)
        model = One(make().requires_grad_(False))
        student = modiff.quantize(model, QuantConfig(base.weight, base.activation, base.modulation, backend=backend))
        outputs[backend], _ = run(student, inputs)
    for found, wanted in zip(outputs["onednn"], outputs["simulate"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("modulation", [{}, {"warmup": "refine"}, {"refresh_every": 3}, {"error_compensation": False}])
@pytest.mark.parametrize("preset", ["w8a7-modiff-paper", "w8a4-modiff-paper"])
def test_whole_students_agree_with_the_simulation(preset, modulation):
    outputs = []
    for backend in ("auto", "simulate"):
        base = config(preset, **modulation)
        made = QuantConfig(base.weight, base.activation, base.modulation, backend=backend)
        outputs.append(run(modiff.quantize(denoiser(), made), noise(6))[0])
    for found, wanted in zip(*outputs, strict=True):
        # Deeper operators see inputs that differ in the last bit, so that single codes may differ by one.
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_layouts_and_single_samples_change_nothing():
    torch.manual_seed(0)
    student = modiff.quantize(One(nn.Conv2d(4, 5, 3, padding=1).requires_grad_(False)), config("w8a6-modiff-paper"))
    inputs = drift((2, 4, 6, 5), 4)
    expected, _ = run(student, [(x,) for x in inputs])
    last, _ = run(student, [(x.to(memory_format=torch.channels_last),) for x in inputs])
    strided, _ = run(student, [(torch.stack([x, x], -1)[..., 0],) for x in inputs])
    for found in (last, strided):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_copies_pack_their_own_weight_and_packed_ones_are_freed():
    gc.collect()
    before = len(onednn._PACKED)
    student = modiff.quantize(denoiser(), config("w8a6-modiff-paper"))
    expected, _ = run(student, noise(3))
    twin = copy.deepcopy(student)
    found, _ = run(twin, noise(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(onednn._PACKED) == before + 6
    for name, operator in modulated(twin).items():
        ours, theirs = (m.region.execution.prepared.weight for m in (operator, modulated(student)[name]))
        assert ours.number != theirs.number
    del student, twin, operator, ours, theirs
    gc.collect()
    assert len(onednn._PACKED) == before
