"""The fast operators against the recurrence of docs/method.md in float64, over 20 evaluations of a drifting input."""

import copy
import itertools
import random

import pytest
import torch
from small_models import drift
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.operators.reference import ReferenceOperator, activation_labels

EVALUATIONS = 20

OPERATORS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear tokens": (lambda: nn.Linear(6, 5), (2, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "linear of one sample": (lambda: nn.Linear(6, 5), (6,)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 7)),
    "conv1d reflect": (lambda: nn.Conv1d(6, 4, 3, padding=2, padding_mode="reflect"), (2, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
    "conv2d stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=(1, 0)), (2, 6, 6, 5)),
    "conv2d dilation": (lambda: nn.Conv2d(6, 4, 2, dilation=2), (2, 6, 5, 5)),
    "conv2d groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding="same"), (2, 6, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 4, 4)),
    "conv2d circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 4, 4)),
    "conv2d replicate": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"), (2, 6, 4, 4)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 4, 4)),
    "conv2d of one sample": (lambda: nn.Conv2d(6, 4, 3), (6, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, padding=1), (2, 6, 3, 3, 3)),
}
ACTIVATIONS = ["tensor", "sample", "channel", "sample_channel", "token", "group"]
WEIGHTS = ["tensor", "channel", "group", None]
MODULATIONS = {
    "plain": None,
    "full": Modulation(),
    "refine": Modulation(warmup="refine"),
    "refine once": Modulation(warmup="refine", warmup_rounds=1),
    "uncompensated": Modulation(error_compensation=False),
    "refresh": Modulation(refresh_every=7),
    "refine and refresh": Modulation(warmup="refine", refresh_every=6),
}
BITS = range(2, 9)


def spec(granularity, bits, symmetric, clip=1.0):
    return QuantSpec(bits, granularity, symmetric, clip=clip, group_size=4 if granularity == "group" else None)


def sample_cases():
    """Random combinations: every operator with every activation granularity; the rest dealt round, each often."""
    dealt = {
        "bits": itertools.cycle(random.Random(1).sample(list(BITS) * 3, 21)),
        "weight": itertools.cycle(random.Random(2).sample(WEIGHTS * 5, 20)),
        "symmetric": itertools.cycle([True, False, False, True, True, False, True]),
        "modulation": itertools.cycle(random.Random(3).sample(list(MODULATIONS) * 3, 21)),
        "clip": itertools.cycle([1.0, 1.0, 0.8]),
        "weight_bits": itertools.cycle([8, 4, 3, 2, 5]),
    }
    for operator, granularity in itertools.product(OPERATORS, ACTIVATIONS):
        if granularity == "token" and not operator.startswith("linear"):
            continue
        yield (operator, granularity, *(next(values) for values in dealt.values()))


CASES = list(sample_cases())


def test_every_value_is_sampled_at_least_twice():
    columns = list(zip(*CASES, strict=True))
    wanted = [OPERATORS, ACTIVATIONS, BITS, WEIGHTS, [True, False], MODULATIONS, [1.0, 0.8], [2, 3, 4, 5, 8]]
    for column, values in zip(columns, wanted, strict=True):
        for value in values:
            assert column.count(value) >= 2, value


def build(operator, activation, weight, modulation, dtype):
    torch.manual_seed(7)
    make, shape = OPERATORS[operator]
    module = make().to(dtype)
    reference = ReferenceOperator(module, weight, activation, modulation)
    student = modiff.quantize(nn.Sequential(module), QuantConfig(weight, activation, modulation))
    return student, reference, drift(shape, EVALUATIONS, seed=11, dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case))
def test_float64_students_follow_the_reference(case):
    operator, granularity, bits, weight, symmetric, modulation, clip, weight_bits = case
    weight = weight and spec(weight, weight_bits, symmetric=True)
    student, reference, inputs = build(
        operator, spec(granularity, bits, symmetric, clip), weight, MODULATIONS[modulation], torch.float64
    )
    with modiff.trajectory(student):
        for a in inputs:
            # Both compute in float64; sums run in another order.
            torch.testing.assert_close(student(a), reference.evaluate(a), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", WEIGHTS[:3])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_weights_alone_follow_the_reference(bits, granularity, symmetric):
    student, reference, inputs = build("conv2d groups", None, spec(granularity, bits, symmetric), None, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(student(inputs[0]), reference.evaluate(inputs[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("modulation", ["full", "refine", "refresh"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (8, True), (8, False)])
@pytest.mark.parametrize("operator", ["linear tokens", "conv2d", "conv1d reflect"])
def test_float32_students_stay_within_a_code_of_the_reference(operator, bits, symmetric, modulation):
    """In float32 a value near the middle between two codes may round the other way.

    Error compensation feeds that back, so â never differs by more than a code of the residual in use. Where no value
    flipped, only float32 rounding is left: 1e-4 of the input's size covers 20 evaluations.
    """
    activation = spec("sample", bits, symmetric)
    student, reference, inputs = build(operator, activation, None, MODULATIONS[modulation], torch.float32)
    with modiff.trajectory(student) as run:
        for a in inputs:
            difference = torch.zeros_like(a) if run.total == 0 else a - reference.a_hat
            student(a)
            reference.evaluate(a)
            code = (difference.amax() - difference.amin()) / (2**bits - 1 - symmetric)
            error = (run.caches["0"][0].a_hat - reference.a_hat).abs()
            assert error.max() <= 1.1 * code + 1e-4
            assert (error > 1e-4).float().mean() < 0.05


def test_outputs_of_float32_students_follow_the_reference():
    """At 4 bits nearly no value flips in 20 evaluations; the mean error is then float32 rounding."""
    student, reference, inputs = build("conv2d", spec("sample", 4, True), None, Modulation(), torch.float32)
    with modiff.trajectory(student):
        outputs = [(student(a), reference.evaluate(a)) for a in inputs]
    for found, expected in outputs:
        assert (found - expected).norm() / expected.norm() < 1e-3
    assert (outputs[-1][1] - copy.deepcopy(reference.with_bias)(inputs[-1].double())).norm() > 0  # Q did something


def test_the_reference_itself_on_a_worked_example():
    """Two evaluations by hand: 2 bits symmetric, codes -1, 0, 1, weight 2, bias 10."""
    linear = nn.Linear(1, 1)
    with torch.no_grad():
        linear.weight.fill_(2.0)
        linear.bias.fill_(10.0)
    reference = ReferenceOperator(linear, None, QuantSpec(2, "tensor"), Modulation())
    assert reference.evaluate(torch.tensor([[1.0], [4.0]])).tolist() == [[12.0], [18.0]]
    # Differences 1 and .4: scale 1, codes 1 and 0, so â = (2, 4), ô = 10 + 2 â.
    assert reference.evaluate(torch.tensor([[2.0], [4.4]])).tolist() == [[14.0], [18.0]]
    # The .4 that was lost is in the next difference: (.25, .5) has scale .5, codes round(.5) = 0 and 1.
    assert reference.evaluate(torch.tensor([[2.25], [4.5]])).tolist() == [[14.0], [19.0]]
    assert reference.a_hat.tolist() == [[2.0], [4.5]]


def test_reference_labels_of_a_worked_example():
    shape = torch.Size([2, 3])
    linear, labels = nn.Linear(3, 1), activation_labels
    assert labels(shape, QuantSpec(8, "tensor"), linear).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert labels(shape, QuantSpec(8, "sample"), linear).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert labels(shape, QuantSpec(8, "channel"), linear).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert labels(shape, QuantSpec(8, "group", group_size=2), linear).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert labels(shape, QuantSpec(8, "sample_channel"), linear).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert labels(torch.Size([1, 2, 2]), QuantSpec(8, "token"), linear).tolist() == [[[0, 0], [1, 1]]]
    conv = nn.Conv1d(2, 1, 1)
    assert labels(torch.Size([1, 2, 2]), QuantSpec(8, "channel"), conv).tolist() == [[[0, 0], [1, 1]]]
