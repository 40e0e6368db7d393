"""Rounding methods against their papers' equations, brute force, and each other."""

import itertools
import logging

import pytest
import torch

from modiff.calibration.loop.moments import Moments
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights.adaround import adaround
from modiff.calibration.weights.gptq import gptq
from modiff.calibration.weights.learned_rounding import penalty_beta
from modiff.config.quant import QuantSpec
from modiff.errors import CalibrationError, ConfigError
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import (
    QuantizedWeight,
    SoftRounding,
    rectified_sigmoid,
    round_lp,
    round_nearest,
    rounding_penalty,
)

SPECS = [
    QuantSpec(4, "channel"),
    QuantSpec(3, "channel", symmetric=False),
    QuantSpec(4, "tensor"),
    QuantSpec(3, "group", group_size=4),
]


def problem(seed=0, out=6, size=10, count=40, groups=1):
    """Weight and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups * out, size, generator=generator)
    mixing = torch.randn(size, size, generator=generator)
    x = torch.randn(groups, count, size, generator=generator) @ mixing + 1
    return weight, x.mT @ x, x


def loss(quantized, weight, hessian):
    error = (quantized.dequantize() - weight).reshape(len(hessian), -1, hessian.shape[1])
    return ((error @ hessian) * error).sum(dim=-1).flatten()


def test_rectified_sigmoid_and_penalty_on_a_case_solved_by_hand():
    # sigmoid(log 3) = 3/4, so h = .75 * 1.2 - .1 = .8; sigmoid(-log 3) = 1/4, h = .2; far out it is cut to 0 and 1.
    v = torch.tensor([1.0986123, 0.0, -1.0986123, 8.0, -8.0])
    h = rectified_sigmoid(v)
    assert torch.allclose(h, torch.tensor([0.8, 0.5, 0.2, 1.0, 0.0]), atol=1e-6)
    # 1 - |2h - 1|^2: .64, 1, .64, 0, 0; with exponent 1: .4, 1, .4, 0, 0.
    assert rounding_penalty(h, 2.0).item() == pytest.approx(2.28, abs=1e-5)
    assert rounding_penalty(h, 1.0).item() == pytest.approx(1.8, abs=1e-5)


def test_soft_and_hard_rounding_on_a_case_solved_by_hand():
    # 3 bits symmetric: codes -3..3; the largest weight 1.5 makes the scale .5.
    weight, spec = torch.tensor([[1.5, 0.6, -0.6, 0.2]]), QuantSpec(3, "channel")
    soft, v = SoftRounding.of(weight, round_nearest(weight, spec), spec)
    assert torch.equal(soft.floor, torch.tensor([[3.0, 1.0, -2.0, 0.0]]))
    assert torch.allclose(soft.soft(v), weight, atol=1e-6)
    assert torch.equal(soft.hard(v).codes, round_nearest(weight, spec).codes)
    up, down = torch.full_like(v, 9.0), torch.full_like(v, -9.0)
    assert torch.equal(soft.hard(up).codes, torch.tensor([[3.0, 2.0, -1.0, 1.0]]))  # 3 + 1 is beyond the last code
    assert torch.equal(soft.hard(down).codes, torch.tensor([[3.0, 1.0, -2.0, 0.0]]))
    assert torch.equal(soft.soft(up), torch.tensor([[1.5, 1.0, -0.5, 0.5]]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_soft_rounding_starts_at_the_weight_and_stays_packable(spec):
    weight, _, _ = problem(3)
    grid = round_nearest(weight, spec)
    soft, v = SoftRounding.of(weight, grid, spec)
    low, high = spec.code_range
    inside = (grid.codes > low) & (grid.codes < high)  # a code at the end may stand for a weight beyond it
    assert torch.allclose(soft.soft(v)[inside], weight[inside], atol=1e-5)
    assert inside.float().mean() > 0.5
    hard = soft.hard(v)
    assert torch.equal(PackedWeight.pack(hard, spec).unpack().codes, hard.codes)


def test_penalty_begins_after_the_warmup_and_falls_from_first_to_last_beta():
    settings = CalibrationSettings(iterations=11, warmup=0.2, beta=(20.0, 2.0))
    betas = [penalty_beta(step, settings) for step in range(11)]
    assert betas[:3] == [None, None, None]
    assert betas[3] == pytest.approx(20, abs=1.5)
    assert betas[10] == pytest.approx(2)
    assert betas[3:] == sorted(betas[3:], reverse=True)


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_lp_scales_lose_least_of_all_ratios(spec, p):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 9.0

    def norm(quantized):
        return (quantized.dequantize() - weight).abs().pow(p).sum()

    best = norm(round_lp(weight, spec, p))
    assert best < norm(round_nearest(weight, spec))
    for ratio in (0.9, 0.6, 0.3):
        clipped = QuantSpec(spec.bits, spec.granularity, spec.symmetric, clip=ratio, group_size=spec.group_size)
        assert best <= norm(round_nearest(weight, clipped)) * 1.01  # between two ratios of the grid


def test_lp_scale_of_one_set_does_not_depend_on_another():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    spec = QuantSpec(3, "channel", symmetric=False)
    alone = round_lp(weight[1:2], spec)
    together = round_lp(weight, spec)
    assert torch.equal(together.scale[1:2], alone.scale)
    assert together.zero_point is not None
    assert torch.equal(together.zero_point[1:2], alone.zero_point)


def by_definition(w, hessian, grid, spec):
    """One row, by the definition: round a column, then solve for the rest by least squares, and again."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    codes, target = torch.zeros_like(w), w.double().clone()
    scale = grid.scale.expand(1, len(w))[0].double()
    low, high = spec.code_range
    for k, i in enumerate(order):
        codes[i] = (target[i] / scale[i]).round().clamp(low, high)
        rest = order[k + 1 :]
        if len(rest):
            # Columns before i were solved for already: only the newest error moves the rest.
            error = codes[i].double() * scale[i] - target[i]
            target[rest] -= torch.linalg.solve(hessian[rest][:, rest], hessian[rest, i] * error)
    return codes


@pytest.mark.parametrize("block", [3, 128])
def test_gptq_of_a_row_is_the_sequence_of_least_squares_solutions(block):
    spec = QuantSpec(4, "channel")
    different = 0
    for seed in range(6):
        weight, hessian, _ = problem(seed, out=1)
        hessian = hessian.double()
        grid = round_nearest(weight, spec)
        expected = by_definition(weight[0], hessian[0], grid, spec)
        found = gptq(weight, hessian, grid, spec, damping=0.0, block=block)
        as_nearest = torch.equal(found.codes, grid.codes)  # the row came out worse than nearest and kept that
        assert torch.equal(found.codes[0], expected) or as_nearest
        different += not as_nearest
    assert different >= 4


def test_gptq_lies_between_nearest_and_the_best_codes_of_all():
    spec = QuantSpec(2, "channel")
    nearest, found, best = 0.0, 0.0, 0.0
    for seed in range(8):
        weight, hessian, _ = problem(seed, out=1, size=6)
        grid = round_nearest(weight, spec)
        every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
        error = every * grid.scale - weight
        optimum = ((error @ hessian[0]) * error).sum(dim=1).min().item()
        result = loss(gptq(weight, hessian, grid, spec, damping=0.0), weight, hessian).item()
        assert result >= optimum * (1 - 1e-4)
        nearest, found, best = nearest + loss(grid, weight, hessian).item(), found + result, best + optimum
    assert best < found < best + 0.5 * (nearest - best)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_gptq_is_never_worse_than_nearest_and_mostly_better(spec, groups):
    for seed in range(5):
        weight, hessian, _ = problem(seed, groups=groups)
        grid = round_nearest(weight, spec)
        moments = Moments(hessian, torch.empty(0), torch.empty(0))
        damped = moments.damped(0.01)
        found = gptq(weight, hessian, grid, spec)
        new, old = loss(found, weight, damped), loss(grid, weight, damped)
        assert (new <= old * (1 + 1e-5)).all()
        assert new.sum() < 0.8 * old.sum()
        assert torch.equal(PackedWeight.pack(found, spec).unpack().codes, found.codes)


def test_gptq_with_independent_inputs_is_nearest():
    weight, _, _ = problem()
    spec = QuantSpec(3, "channel")
    grid = round_nearest(weight, spec)
    assert torch.equal(gptq(weight, torch.eye(10)[None] * 3, grid, spec).codes, grid.codes)


def test_singular_hessian_is_damped_and_said_so(caplog):
    weight, _, x = problem()
    hessian = x[:, :4].mT @ x[:, :4]  # rank 4 of 10
    spec = QuantSpec(4, "channel")
    with caplog.at_level(logging.WARNING):
        found = gptq(weight, hessian, round_nearest(weight, spec), spec, damping=0.0, name="mid.conv")
    assert "'mid.conv' is singular with damping 0" in caplog.text
    assert torch.isfinite(found.codes).all()
    caplog.clear()
    gptq(weight, hessian, round_nearest(weight, spec), spec, damping=0.01, name="mid.conv")
    assert not caplog.text


def test_inputs_that_are_all_zero_give_nearest():
    weight, hessian, _ = problem()
    spec = QuantSpec(4, "channel")
    grid = round_nearest(weight, spec)
    assert torch.equal(gptq(weight, hessian * 0, grid, spec).codes, grid.codes)


@pytest.mark.parametrize(("hessian", "match"), [(torch.nan, "holds NaN"), (-1.0, "singular even when")])
def test_unusable_hessians_name_the_operator(hessian, match):
    matrix = torch.full((1, 10, 10), hessian) if hessian != hessian else torch.ones(1, 10, 10)
    if hessian == -1.0:
        matrix[0, 0, 1] = matrix[0, 1, 0] = 99.0  # not a second moment of anything
    weight, spec = problem()[0], QuantSpec(4, "channel")
    with pytest.raises(CalibrationError, match=match) as error:
        gptq(weight, matrix, round_nearest(weight, spec), spec, name="mid.conv")
    assert "'mid.conv'" in str(error.value)


def moments_of(weight, x, student_x):
    target = x @ weight.reshape(len(x), -1, x.shape[2]).mT
    return Moments(student_x.mT @ student_x, target.mT @ student_x, target.square().sum(), x.shape[1])


@pytest.mark.parametrize("groups", [1, 2])
def test_adaround_lowers_the_output_error(groups):
    settings = CalibrationSettings(iterations=150, damping=0.0)
    spec = QuantSpec(3, "channel", symmetric=False)
    weight, hessian, x = problem(2, groups=groups)
    grid = round_nearest(weight, spec)
    found = adaround(weight, moments_of(weight, x, x), grid, spec, settings)
    assert loss(found, weight, hessian).sum() < 0.75 * loss(grid, weight, hessian).sum()
    floor = ((weight / grid.scale).floor() + grid.zero_point).clamp(*spec.code_range)
    assert ((found.codes - floor) * (found.codes - floor - 1) == 0)[floor < spec.code_range[1]].all()


def test_adaround_aims_at_the_teachers_outputs_from_the_students_inputs():
    """Asymmetric inputs: where the student's inputs are 10 % short, the learned weights make up for it."""
    settings = CalibrationSettings(iterations=150, damping=0.0)
    spec = QuantSpec(4, "channel")
    weight, _, x = problem(5, size=16)
    grid = round_nearest(weight, spec)
    short = x * 0.9

    def error(found):
        return (short @ found.dequantize().mT - x @ weight.mT).square().sum()

    asymmetric = adaround(weight, moments_of(weight, x, short), grid, spec, settings)
    symmetric = adaround(weight, moments_of(weight, short, short), grid, spec, settings)
    assert error(asymmetric) < 0.8 * error(symmetric)


def test_adaround_returns_nearest_where_that_is_exact():
    spec = QuantSpec(3, "channel")
    weight = torch.tensor([[3.0, -2.0, 1.0], [3.0, 0.0, -1.0]])
    x = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    grid = round_nearest(weight, spec)
    assert adaround(weight, moments_of(weight, x, x), grid, spec, CalibrationSettings()) is grid


def test_lp_keeps_an_all_zero_weight():
    zero = round_lp(torch.zeros(2, 5), QuantSpec(4, "channel"))
    assert isinstance(zero, QuantizedWeight)
    assert torch.equal(zero.dequantize(), torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"memory_mib": 0}, "memory_mib is 0"),
        ({"evaluations": 0}, "evaluations is 0"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"beta": (20,)}, "beta is"),
        ({"norm": True}, "norm is True"),
    ],
)
def test_settings_are_checked(fields, match):
    with pytest.raises(ConfigError, match=match):
        CalibrationSettings(**fields)
