"""The invariants of docs/architecture.md that the core answers for, by their numbers."""

import copy
import math
import pickle

import pytest
import torch
from small_models import config, denoiser, drift, modulated, noise, run, student
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec


@pytest.mark.parametrize("state_dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("preset", ["w8a8-modiff", "w8a4-modiff-paper", "w4a2-modiff-paper", "w32a3-modiff-paper"])
@pytest.mark.parametrize("warmup", ["full", "refine"])
def test_invariant_1_output_is_the_operator_of_the_reconstruction(preset, state_dtype, warmup):
    model = student(preset, state_dtype=state_dtype, warmup=warmup)
    assert largest_deviation(model, noise(50)) <= 1


def test_invariant_1_with_bfloat16_state_and_counted_refreshes():
    assert largest_deviation(student(state_dtype="bfloat16", refresh_every=5), noise(20)) <= 1


def largest_deviation(model, inputs):
    """max over operators and evaluations of ||ô - A(â) - bias|| / ||ô||, in units of the stated bound.

    The exact A(â) is in float64; a single float32 product is off by about eps itself, and that is no drift.
    """
    worst = 0.0
    with modiff.trajectory(model) as counts:
        for n, args in enumerate(inputs, start=1):
            model(*args)
            for name, operator in modulated(model).items():
                a_hat, o_hat = counts.caches[name][0].a_hat, counts.caches[name][0].o_hat.double()
                exact = product(operator, a_hat.double())
                rounding = (product(operator, a_hat).double() - exact).norm()
                deviation = ((o_hat - exact).norm() - rounding) / o_hat.norm()
                eps = torch.finfo(getattr(torch, operator.modulation.state_dtype or "float32")).eps
                worst = max(worst, float(deviation) / (eps * math.sqrt(n)))
    return worst


def product(operator, x):
    """A(x) + bias in the dtype of x, with the weight that the operator uses."""
    original = copy.deepcopy(operator.module).to(x.dtype)
    if operator.weight_spec is not None:
        original.weight.copy_(operator._quantized_weight)
    return original(x)


@pytest.mark.parametrize(
    ("preset", "modulation", "quantized"),
    [
        ("w8a4-modiff-paper", {}, 9),
        ("w8a4-modiff-paper", {"warmup": "refine"}, 10),
        ("w8a4-modiff-paper", {"refresh_every": 4}, 7),
        ("w8a4-modiff-paper", {"refresh_every": 4, "warmup": "refine"}, 8),
        ("w8a4-modiff-paper", {"error_compensation": False}, 9),
        ("w8a4-ptq-paper", {}, 10),
        ("w8a32-modiff", {}, 0),
        ("w8a32-ptq", {}, 0),
    ],
)
def test_invariant_2_evaluations_are_counted_per_trajectory(preset, modulation, quantized):
    model = student(preset, **modulation)
    for _ in range(2):
        _, counts = run(model, noise(10))
        assert (counts.total, counts.quantized) == (10, quantized)


def test_invariant_2_mixed_operators_count_as_the_last_to_be_quantized():
    """Refreshes of a single operator by rule make the whole evaluation not quantized."""
    base = config()
    rule = modiff.Rule("conv_in", modulation=Modulation(refresh_every=3))
    model = modiff.quantize(denoiser(), QuantConfig(base.weight, base.activation, base.modulation, [rule]))
    _, counts = run(model, noise(10))
    assert counts.quantized == 10 - 1 - 3


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper"])
def test_invariant_2_a_second_trajectory_does_not_see_the_first(preset):
    model = student(preset)
    first, _ = run(model, noise(5, seed=1))
    run(model, noise(7, seed=2, batch=3))
    again, _ = run(model, noise(5, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_invariant_5_both_arms_quantize_the_same_operators_at_the_same_bits(bits):
    rules = [modiff.Rule("conv_out", weight=QuantSpec(5, "channel")), modiff.Rule("time", skip=True)]
    tables = []
    for method in ("modiff", "ptq"):
        base = QuantConfig.preset(f"w8a{bits}-{method}")
        model = modiff.quantize(denoiser(), QuantConfig(base.weight, base.activation, base.modulation, rules))
        rows = modiff.describe(model)
        tables.append([(r.name, r.weight, r.activation and r.activation.bits, r.rule, r.skipped) for r in rows])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 3


def test_invariant_5_ablation_without_compensation_differs_in_nothing_else():
    with_, without = student(), student(error_compensation=False)
    for a, b in zip(modiff.describe(with_), modiff.describe(without), strict=True):
        assert (a.name, a.weight, a.activation) == (b.name, b.weight, b.activation)
        assert a.modulation != b.modulation


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w2a2-ptq-paper", "w4a32-modiff-paper"])
@pytest.mark.parametrize("copied", ["", "deepcopy", "pickle"])
def test_invariant_6_restoring_gives_the_teacher_back_bit_for_bit(preset, copied):
    model, inputs = denoiser(), noise(2)
    expected = [model(*args) for args in inputs]
    weights = copy.deepcopy(model.state_dict())
    model = modiff.quantize(model, config(preset))
    run(model, inputs)
    if copied:
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
        outputs, counts = run(model, inputs)
        assert counts.total == 2
        assert not torch.equal(outputs[-1], expected[-1])
    restored = modiff.restore(model)
    assert restored is model
    assert all(torch.equal(restored(*args), e) for args, e in zip(inputs, expected, strict=True))
    assert weights.keys() == restored.state_dict().keys()
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in weights.items())
    assert not restored._forward_hooks
    assert not restored._forward_pre_hooks
    assert not any("modiff" in name for name in vars(restored))


def test_invariant_6_without_kept_teacher_restoring_takes_the_weights_given():
    model, teacher = denoiser(), denoiser()
    args = noise(1)[0]
    expected = model(*args)
    model = modiff.quantize(model, config("w2a32-ptq-paper"), keep_teacher=False)
    quantized = model(*args)
    assert not torch.allclose(quantized, expected, rtol=0.01)
    assert torch.equal(copy.deepcopy(model)(*args), quantized)
    assert torch.equal(modiff.restore(model, teacher=teacher)(*args), expected)


@pytest.mark.parametrize("modulation", [None, Modulation()])
def test_invariant_7_without_specs_the_student_equals_the_teacher(modulation):
    model, inputs = denoiser(), noise(5)
    expected = [model(*args) for args in inputs]
    outputs, _ = run(modiff.quantize(model, QuantConfig(modulation=modulation)), inputs)
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("modulation", [{}, {"error_compensation": False}, {"refresh_every": 3}, {"warmup": "refine"}])
def test_invariant_7_with_an_identity_quantizer_the_student_equals_the_teacher(modulation, monkeypatch):
    monkeypatch.setattr("modiff.kernels.elementwise.codes_", identity)
    model, inputs = denoiser().double(), noise(10, dtype=torch.float64)
    expected = [model(*args) for args in inputs]
    base = config(**modulation)
    outputs, _ = run(modiff.quantize(model, QuantConfig(None, base.activation, base.modulation)), inputs)
    for found, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def identity(x, scale, zero_point, limits, clips):
    return x.div_(scale)


def test_errors_are_fed_back_and_do_not_accumulate():
    """Equation (18), and what goes wrong without error compensation: output errors of 60 evaluations at 3 bits."""
    inputs = [(x,) for x in drift((4, 6, 8, 8), 60, dtype=torch.float64)]
    errors = {}
    for compensated in (True, False):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Conv2d(6, 6, 3)).double().requires_grad_(False)
        expected = [teacher(*args) for args in inputs]
        modulation = Modulation(error_compensation=compensated)
        outputs, _ = run(modiff.quantize(teacher, QuantConfig(None, QuantSpec(3, "sample"), modulation)), inputs)
        errors[compensated] = [float((o - e).norm()) for o, e in zip(outputs, expected, strict=True)]
    assert max(errors[True][40:]) < 1.5 * max(errors[True][1:21])
    assert max(errors[False][40:]) > 1.5 * max(errors[False][1:21])
    assert errors[False][-1] > 3 * errors[True][-1]


def test_teacher_and_student_share_no_memory_that_is_written():
    model = nn.Sequential(nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    run(modiff.quantize(model, config("w2a2-modiff-paper")), [(torch.randn(3, 4),) for _ in range(3)])
    assert torch.equal(model[0].module.weight, before)
