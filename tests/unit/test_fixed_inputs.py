"""Fixed inputs (trap 10): computed once, exactly, and shown."""

import pytest
import torch
from small_models import config
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.errors import TrajectoryError
from modiff.kernels import float as float_backend
from modiff.kernels.onednn import OneDNN


class Prompted(nn.Module):
    """Queries of a changing x, keys of a fixed prompt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(6, 4)
        self.to_k = nn.Linear(5, 4)
        self.out = nn.Linear(3, 6)
        self.requires_grad_(False)

    def forward(self, x, prompt):
        return self.out(self.to_q(x) @ self.to_k(prompt).mT)


XS = list(torch.randn(5, 2, 7, 6, generator=torch.Generator().manual_seed(1)))
PROMPT = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))


def prompted(**modulation):
    return modiff.quantize(
        Prompted(), config("w8a4-modiff-paper", **modulation) if modulation else config("w8a4-modiff-paper")
    )


def outputs(model, prompts):
    with modiff.trajectory(model) as counts:
        found = [model(x, prompt) for x, prompt in zip(XS, prompts, strict=True)]
    return found, counts


@pytest.fixture
def products(monkeypatch):
    """Number of products by the operator's number of inputs: to_k has 5, to_q 6, out 3."""
    counts = {3: 0, 5: 0, 6: 0}
    floats, integers = float_backend.linear_map, OneDNN.multiply

    def counting(x, weight, bias, shape):
        counts[shape.in_channels] += 1
        return floats(x, weight, bias, shape)

    def counting_integers(self, prepared, encoded):
        counts[prepared.shape.in_channels] += 1
        return integers(self, prepared, encoded)

    monkeypatch.setattr(float_backend, "linear_map", counting)
    monkeypatch.setattr(OneDNN, "multiply", counting_integers)
    return counts


VARIANTS = [{}, {"error_compensation": False}, {"state_dtype": "float16"}, {"refresh_every": 2}]


@pytest.mark.parametrize("modulation", VARIANTS)
def test_a_fixed_input_is_multiplied_once_and_exactly(products, modulation):
    expected, plain = outputs(prompted(**modulation), [PROMPT.clone() for _ in XS])
    assert products[5] == 5
    products.update({3: 0, 5: 0, 6: 0})
    model = prompted(**modulation)
    found, counts = outputs(model, [PROMPT] * 5)
    assert products == {3: 5, 5: 1, 6: 5}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (counts.total, counts.quantized) == (plain.total, plain.quantized)
    assert counts.constant == {"to_k"}


def test_an_equal_view_of_the_same_memory_is_fixed_too(products):
    flat = PROMPT.clone().view(-1)
    outputs(prompted(), [flat.view(2, 3, 5) for _ in XS])
    assert products[5] == 1


def test_an_input_that_does_change_is_followed(products):
    model, changing = prompted(), PROMPT.clone()
    expected, _ = outputs(prompted(), [PROMPT, PROMPT.clone(), PROMPT + 1, PROMPT + 1, PROMPT + 1])
    products.update({3: 0, 5: 0, 6: 0})
    found = []
    with modiff.trajectory(model) as counts:
        for i, x in enumerate(XS):
            if i == 2:
                changing.add_(1)
            found.append(model(x, changing))
            cache = counts.caches["to_k"][0]
            exact = model.to_k.product(cache.a_hat, with_bias=True)
            torch.testing.assert_close(cache.o_hat, exact, rtol=1e-5, atol=1e-5)
    assert products[5] == 1 + 3 + 5  # the warm-up, three quantized differences, and the five of this test itself
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "to_k" not in counts.constant


@pytest.mark.parametrize(
    "other",
    [
        lambda p: p + 1,
        lambda p: p.flip(0),
        lambda p: p.mT.contiguous().mT,
        lambda p: p.expand(2, 3, 5)[:, [0, 2, 1]],
    ],
)
def test_another_tensor_is_not_taken_for_it(products, other):
    outputs(prompted(), [PROMPT, *[other(PROMPT) for _ in XS[1:]]])
    assert products[5] == 5


def test_freed_memory_that_is_used_again_is_not_taken_for_it(products):
    """Each prompt is a new tensor at the address of the last one, as an allocator gives it out; the values differ."""
    model, memory, addresses = prompted(), PROMPT.numpy().copy(), set()
    with modiff.trajectory(model):
        for x in XS:
            prompt = torch.from_numpy(memory)
            addresses.add((prompt.data_ptr(), prompt._version))
            model(x, prompt)
            del prompt
            memory += 1
    assert products[5] == 5
    assert len(addresses) == 1


def test_writes_that_pytorch_does_not_count_are_reported():
    model, prompt = prompted(), PROMPT.clone()

    def overwriting():
        for _ in XS:
            yield prompt
            prompt.data.add_(1)

    with pytest.raises(TrajectoryError, match="input of operator 'to_k' was overwritten between evaluations in a way"):
        outputs(model, overwriting())
    outputs(model, [PROMPT] * 5)


def test_inference_tensors_have_no_count_of_writes_and_are_computed(products):
    with torch.inference_mode():
        prompt = PROMPT.clone()
    found, _ = outputs(prompted(), [prompt] * 5)
    assert products[5] == 5
    assert torch.equal(found[-1], outputs(prompted(), [PROMPT] * 5)[0][-1])


def test_what_the_caller_does_with_the_result_does_not_reach_the_state():
    model = modiff.quantize(nn.Sequential(nn.Linear(5, 4)).requires_grad_(False), config("w8a4-modiff-paper"))
    with modiff.trajectory(model):
        first = model(PROMPT).clone()
        model(PROMPT).zero_()
        assert torch.equal(model(PROMPT), first)


def test_an_integer_warm_up_goes_on_refining(products):
    """After the rounds â is near a fixed input, not equal to it: its residual is not zero yet."""
    model = prompted(warmup="refine", warmup_rounds=2)
    with modiff.trajectory(model) as counts:
        errors = []
        for x in XS[:3]:
            model(x, PROMPT)
            errors.append(float((counts.caches["to_k"][0].a_hat - PROMPT).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert products[5] == 2 + 2
    assert counts.constant == set()


def test_plain_quantization_keeps_nothing_to_reuse(products):
    outputs(modiff.quantize(Prompted(), config("w8a4-ptq-paper")), [PROMPT] * 5)
    assert products[5] == 5


def test_each_context_has_its_own_fixed_input(products):
    model, other = prompted(), PROMPT + 1
    with modiff.trajectory(model, contexts=("uncond", "cond")) as counts:
        for x in XS:
            model(x, other)
            model(x, PROMPT)
    assert products[5] == 2
    assert counts.constant == {"to_k"}


def test_a_new_trajectory_computes_it_again(products):
    model = prompted()
    outputs(model, [PROMPT] * 5)
    outputs(model, [PROMPT] * 5)
    assert products[5] == 2


def test_describe_and_cost_show_it_after_a_run():
    model = prompted()
    assert not any(row.constant for row in modiff.describe(model))
    before = {row.name: row.bops for row in modiff.cost(model, XS[0], PROMPT, evaluations=10).operators}
    assert not any(row.constant for row in modiff.describe(model))
    outputs(model, [PROMPT] * 5)
    assert [row.name for row in modiff.describe(model) if row.constant] == ["to_k"]
    line = next(line for line in str(modiff.describe(model)).splitlines() if line.startswith("to_k"))
    assert "constant input: computed once" in line
    cost = modiff.cost(model, XS[0], PROMPT, evaluations=10)
    macs = 3 * 5 * 4
    rows = {row.name: row for row in cost.operators}
    assert rows["to_k"].macs == macs
    assert rows["to_k"].bops == pytest.approx(macs * 8 * 32 / 10)
    assert before["to_k"] == pytest.approx(macs * 8 * (32 + 9 * 4) / 10)
    twice = modiff.cost(model, XS[0], PROMPT, evaluations=10, contexts=2).operators  # each context computes it
    assert {row.name: row.bops for row in twice}["to_k"] == pytest.approx(macs * 8 * 2 * 32 / 10)
    assert rows["to_q"].bops == before["to_q"]
    assert (rows["to_k"].constant, rows["to_q"].constant) == (True, False)
    assert [row.name for row in modiff.describe(model) if row.constant] == ["to_k"]  # measuring is no run
    outputs(model, [PROMPT.clone() for _ in XS])
    assert not any(row.constant for row in modiff.describe(model))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "sample", "channel", "token"])
def test_it_is_what_the_multiplication_of_zeros_would_give(symmetric, granularity):
    spec = QuantSpec(3, granularity, symmetric=symmetric)
    results = [
        outputs(modiff.quantize(Prompted(), QuantConfig(None, spec, Modulation())), prompts)[0]
        for prompts in ([PROMPT] * 5, [PROMPT.clone() for _ in XS])
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
