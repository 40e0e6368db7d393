"""State in fewer bytes: ô in float16, â in whole int16 steps, one â for operators that read the same tensor."""

import math
import re

import pytest
import torch
from small_models import config, denoiser, drift, modulated, noise, run
from torch import nn

import modiff
from modiff import Modulation, QuantConfig
from modiff.errors import ConfigError, TrajectoryError
from modiff.kernels import stages
from modiff.layers.modulated import ModulatedOperator

DIET = {"state_dtype": "float16", "reconstruction_dtype": "int16"}


def states(counts):
    return {name: caches[0] for name, caches in counts.caches.items()}


@pytest.mark.parametrize("preset", ["w8a8-modiff", "w8a6-modiff", "w8a4-modiff", "w8a2-modiff"])
@pytest.mark.parametrize("backend", ["auto", "simulate"])
@pytest.mark.parametrize("modulation", [DIET, {"reconstruction_dtype": "int16"}, {**DIET, "warmup": "refine"}])
def test_invariant_1_with_small_states(preset, backend, modulation):
    base = config(preset, **modulation)
    model = modiff.quantize(denoiser(), QuantConfig(base.weight, base.activation, base.modulation, backend=backend))
    inputs = noise(20)
    epsilon = torch.finfo(getattr(torch, modulation.get("state_dtype", "float32"))).eps
    with modiff.trajectory(model) as counts:
        for n, args in enumerate(inputs, start=1):
            model(*args)
            for name, operator in modulated(model).items():
                cache = counts.caches[name][0]
                weight = operator.quantized_weight().double()
                bias = None if operator.bias is None else operator.bias.double()
                wanted = operator.adapter.apply(operator.module, cache.reconstruction().double(), weight, bias)
                error = (cache.o_hat.double() - wanted).norm() / wanted.norm()
                assert error <= 2 * epsilon * math.sqrt(n)


def test_half_of_the_bytes():
    sizes = []
    for modulation in ({"warmup": "full"}, DIET):
        model = modiff.quantize(denoiser(), config("w8a6-modiff", **modulation))
        with modiff.trajectory(model) as counts:
            model(*noise(1)[0])
            model(*noise(2)[1])
            sizes.append(counts.state_bytes)
            kept = {(c.a_hat.dtype, c.o_hat.dtype) for c in states(counts).values()}
    assert kept == {(torch.int16, torch.float16)}
    assert sizes[1] == sizes[0] / 2


def test_reconstructions_are_whole_steps_and_scales_whole_multiples():
    torch.manual_seed(0)
    a, step = torch.randn(2, 8), None
    step = stages.int16_step(a)
    assert step == 2.0 ** round(math.log2(step))
    a_hat = stages.to_steps(a, step)
    assert a_hat.abs().max() > 2**12  # fine enough
    before = a_hat.clone()
    limits = stages.Limits.of(modiff.QuantSpec(4, "sample"), a)
    codes, scale, _ = stages.encode(a + 0.1 * torch.randn(2, 8), a_hat, step, limits, None, offset=64)
    multiple = scale / step
    assert torch.equal(multiple, multiple.round())
    assert torch.equal(a_hat.float(), before.float() + (codes.float() - 64) * multiple)


def test_inputs_that_outgrow_int16_are_held_at_its_end_and_fed_back():
    torch.manual_seed(0)
    model = modiff.quantize(
        nn.Sequential(nn.Linear(4, 3, bias=False)), config("w8a6-modiff", reconstruction_dtype="int16")
    )
    start = torch.tensor([[1.0, -1.0, 0.5, 0.25]])
    xs = [start, *[start * 100] * 4, *[start] * 40]
    with modiff.trajectory(model) as counts:
        for i, x in enumerate(xs):
            model(x.clone())
            cache = counts.caches["0"][0]
            if i == 4:
                assert cache.a_hat.abs().max() <= stages.INT16_TOP
                assert cache.a_hat[0, 0] > 30000  # held near the end, not wrapped
                assert cache.a_hat[0, 1] < -30000
        assert (cache.reconstruction() - start).abs().max() < 0.01  # and back again


def test_outputs_stay_close_to_those_of_full_states():
    plain, _ = run(modiff.quantize(denoiser(), config("w8a6-modiff")), noise(20))
    small, _ = run(modiff.quantize(denoiser(), config("w8a6-modiff", **DIET)), noise(20))
    for a, b in zip(small[1:], plain[1:], strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match=re.escape("reconstruction_dtype is 'int8'; allowed are float32, int16.")):
        Modulation(reconstruction_dtype="int8")


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(6, 5) for _ in range(3))

    def forward(self, x, other=None):
        key = self.to_k(x if other is None else other)
        return torch.softmax(self.to_q(x) @ key.mT, -1) @ self.to_v(x)


@pytest.mark.parametrize("modulation", [{}, DIET, {"refresh_every": 2}, {"error_compensation": False}])
def test_operators_that_read_one_tensor_share_its_reconstruction(monkeypatch, modulation):
    inputs = [(x,) for x in drift((2, 3, 6), 6)]
    base = config("w8a4-modiff", **modulation)
    model = modiff.quantize(SelfAttention(), base)
    with modiff.trajectory(model) as counts:
        found = [model(*args) for args in inputs]
        shared = counts.state_bytes
        caches = states(counts)
        assert caches["to_k"].a_hat is caches["to_q"].a_hat is caches["to_v"].a_hat
        assert (
            modiff.cost(modiff.quantize(SelfAttention(), base), inputs[0][0]).state_mib_per_image * 2**20 * 2 == shared
        )
    monkeypatch.setattr(ModulatedOperator, "shares", False)
    alone = modiff.quantize(SelfAttention(), base)
    with modiff.trajectory(alone) as counts:
        expected = [alone(*args) for args in inputs]
        assert counts.state_bytes == shared + 2 * caches["to_q"].a_hat.numel() * caches["to_q"].a_hat.element_size()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_operators_that_stop_reading_one_tensor_say_so():
    model = modiff.quantize(SelfAttention(), config("w8a4-modiff"))
    x, y, z = drift((2, 3, 6), 3)
    message = "Operator 'to_q' read the same tensor as another one in the first evaluation"
    with modiff.trajectory(model):
        model(x)
        with pytest.raises(TrajectoryError, match=message):
            model(y, z)


def test_other_quantizers_do_not_share():
    base = config("w8a4-modiff")
    rule = modiff.Rule("to_k", activation=modiff.QuantSpec(6, "sample"))
    model = modiff.quantize(SelfAttention(), QuantConfig(base.weight, base.activation, base.modulation, (rule,)))
    with modiff.trajectory(model) as counts:
        model(torch.randn(2, 3, 6))
        caches = states(counts)
        assert caches["to_k"].a_hat is not caches["to_q"].a_hat
        assert caches["to_v"].a_hat is caches["to_q"].a_hat
