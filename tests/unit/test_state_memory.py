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
from modiff.kernels import elementwise
from modiff.operators.modulated import ModulatedOperator
from modiff.quantizers.affine import Limits
from modiff.quantizers.held import INT16_GROWTH, Held, Int16Grid

DIET = {"state_dtype": "float16", "reconstruction_dtype": "int16"}


def states(counts):
    return {name: caches[0] for name, caches in counts.caches.items()}


@pytest.mark.parametrize("preset", ["w8a8-modiff", "w8a6-modiff-paper", "w8a4-modiff-paper", "w8a2-modiff-paper"])
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
        model = modiff.quantize(denoiser(), config("w8a6-modiff-paper", **modulation))
        with modiff.trajectory(model) as counts:
            model(*noise(1)[0])
            model(*noise(2)[1])
            vectors = states(counts).pop("time").num_bytes
            sizes.append(counts.state_bytes - vectors)
            kept = {(c.a_hat.dtype, c.o_hat.dtype) for name, c in states(counts).items() if name != "time"}
    assert kept == {(torch.int16, torch.float16)}
    assert sizes[1] == sizes[0] / 2


class Mixed(nn.Module):
    """Operators on a vector for each sample, on an image of few channels, on one of many, on tokens."""

    def __init__(self):
        super().__init__()
        self.vector, self.tokens = nn.Linear(32, 8), nn.Linear(8, 8)
        self.first, self.inner, self.grouped = nn.Conv2d(2, 32, 3), nn.Conv2d(32, 8, 3), nn.Conv2d(32, 32, 1, groups=16)
        self.pixel = nn.Conv2d(8, 8, 1)

    def forward(self, x, vector):
        x = self.grouped(self.first(x))
        tokens = self.inner(x).flatten(2).mT
        return (
            self.tokens(tokens)
            + self.vector(vector)[:, None]
            + self.pixel(vector[:, :8, None, None]).flatten(1)[:, None]
        )


def test_vectors_and_inputs_of_few_channels_stay_in_float32():
    model = modiff.quantize(Mixed(), config("w8a6-modiff-paper", **DIET))
    with modiff.trajectory(model) as counts:
        model(torch.randn(2, 2, 6, 6), torch.randn(2, 32))
        found = {name: (c.a_hat.dtype, c.o_hat.dtype) for name, c in states(counts).items()}
    small = {name: (torch.int16, torch.float16) for name in ("inner", "grouped", "tokens")}
    vectors = {name: (torch.float32, torch.float32) for name in ("vector", "pixel")}
    assert found == {**small, **vectors, "first": (torch.float32, torch.float16)}


@pytest.mark.parametrize("one_sided", [False, True])
def test_reconstructions_are_whole_steps_and_scales_whole_multiples(one_sided):
    torch.manual_seed(0)
    a = nn.functional.silu(6 * torch.randn(2, 64)) if one_sided else torch.randn(2, 64)
    grid = Int16Grid.like(a)
    grid.fit(a)
    a_hat = grid.nearest(a)
    assert (grid.decode(a_hat) - a).abs().max() <= 0.51 * grid.step
    assert (a.max() - a.min()).item() == pytest.approx(2**14 * grid.step.item(), rel=1e-3)  # a quarter of all numbers
    before = a_hat.clone()
    limits = Limits.of(modiff.QuantSpec(4, "sample"), a)
    codes, scale, _ = elementwise.encode(a + 0.1 * torch.randn(2, 64), Held(a_hat, grid), limits, None, zero=64)
    multiple = (scale / grid.step).round()
    torch.testing.assert_close(multiple * grid.step, scale, rtol=1e-6, atol=0)
    assert torch.equal(a_hat.float(), before.float() + (codes.float() - 64) * multiple)


def test_the_grid_holds_zero_and_what_inputs_may_grow_to():
    for a in (torch.tensor([-0.25, 8.0]), torch.tensor([3.0, 4.0]), torch.tensor([-5.0, -4.0]), torch.zeros(3)):
        grid = Int16Grid.like(a)
        grid.fit(a)
        assert torch.equal(grid.decode(grid.nearest(torch.zeros(2))), torch.zeros(2))
        grown = INT16_GROWTH * 0.999 * a
        assert torch.equal(grid.clip(grown), grown)
        assert (grid.decode(grid.nearest(grown)) - grown).abs().max() <= 0.51 * grid.step


def test_inputs_that_outgrow_int16_are_clipped_and_followed_back():
    torch.manual_seed(0)
    model = modiff.quantize(
        nn.Sequential(nn.Linear(4, 3, bias=False)), config("w8a6-modiff-paper", reconstruction_dtype="int16")
    )
    start = torch.tensor([[[1.0, -1.0, 0.5, 0.25]]]).repeat(1, 2, 1)
    far = torch.tensor([[[100.0, -100.0, 0.5, 0.25]]]).repeat(1, 2, 1)
    with modiff.trajectory(model) as counts:
        for x in (start, far, far, far):
            model(x.clone())
        cache = counts.caches["0"][0]
        assert cache.a_hat[0, 0, 0] > 30000  # held near the end, not wrapped
        assert cache.a_hat[0, 0, 1] < -30000
        assert (cache.reconstruction() - start)[..., 2:].abs().max() < 0.01  # what fits does not pay for what does not
        for _ in range(8):
            model(start.clone())
        assert (cache.reconstruction() - start).abs().max() < 0.01


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_clipped_is_still_found_not_finite(value):
    model = modiff.quantize(nn.Sequential(nn.Linear(4, 3)), config("w8a6-modiff-paper", reconstruction_dtype="int16"))
    x = torch.ones(1, 2, 4)
    with pytest.raises(TrajectoryError, match="'0'"), modiff.trajectory(model):  # noqa: PT012
        model(x)
        x = x.clone()
        x[0, 1, 2] = value
        model(x)


def test_outputs_stay_close_to_those_of_full_states():
    plain, _ = run(modiff.quantize(denoiser(), config("w8a6-modiff-paper")), noise(20))
    small, _ = run(modiff.quantize(denoiser(), config("w8a6-modiff-paper", **DIET)), noise(20))
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
    base = config("w8a4-modiff-paper", **modulation)
    model = modiff.quantize(SelfAttention(), base)
    with modiff.trajectory(model) as counts:
        found = [model(*args) for args in inputs]
        shared = counts.state_bytes
        caches = states(counts)
        assert caches["to_k"].a_hat is caches["to_q"].a_hat is caches["to_v"].a_hat
        assert (
            modiff.cost(modiff.quantize(SelfAttention(), base), inputs[0][0]).state_mib_per_image * 2**20 * 2 == shared
        )
    monkeypatch.setattr(ModulatedOperator, "sharing_key", lambda self, execution: None)
    alone = modiff.quantize(SelfAttention(), base)
    with modiff.trajectory(alone) as counts:
        expected = [alone(*args) for args in inputs]
        assert counts.state_bytes == shared + 2 * caches["to_q"].a_hat.numel() * caches["to_q"].a_hat.element_size()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_operators_that_stop_reading_one_tensor_say_so():
    model = modiff.quantize(SelfAttention(), config("w8a4-modiff-paper"))
    x, y, z = drift((2, 3, 6), 3)
    message = "Operator 'to_q' read the same tensor as another one in the first evaluation"
    with modiff.trajectory(model):
        model(x)
        with pytest.raises(TrajectoryError, match=message):
            model(y, z)


def test_other_quantizers_do_not_share():
    base = config("w8a4-modiff-paper")
    rule = modiff.Rule("to_k", activation=modiff.QuantSpec(6, "sample"))
    model = modiff.quantize(SelfAttention(), QuantConfig(base.weight, base.activation, base.modulation, (rule,)))
    with modiff.trajectory(model) as counts:
        model(torch.randn(2, 3, 6))
        caches = states(counts)
        assert caches["to_k"].a_hat is not caches["to_q"].a_hat
        assert caches["to_v"].a_hat is caches["to_q"].a_hat
