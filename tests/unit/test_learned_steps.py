"""Learned step sizes (LSQ): gradients, closed loops, zero points and split skips (trap 6)."""

import dataclasses

import pytest
import torch
from range_cases import FAST, calibrated, config, found_ranges, residuals, run_split, same, sampler
from small_models import denoiser
from torch import nn

from modiff import QuantSpec
from modiff.calibration.ranges import lsq
from modiff.calibration.ranges.lsq import learned_quantize, quantizer_of
from modiff.calibration.ranges.observe import RangeCalibration
from modiff.quantizers.calibrated import CalibratedRange
from modiff.student.swap import convert, operators


def test_the_gradient_of_the_step_size_is_that_of_lsq():
    """Esser et al. 2020, equation 3: -x/s + round(x/s) inside; -Q_N and Q_P beyond."""
    x = torch.tensor([-9.0, -1.3, 0.2, 0.9, 9.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    values = learned_quantize(x, scale, None, QuantSpec(3))
    found = torch.stack([torch.autograd.grad(v, scale, retain_graph=True)[0] for v in values])
    inside = -x / 0.5 + (x / 0.5).round()
    wanted = torch.tensor([-3.0, *inside[1:4].tolist(), 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_the_zero_point_is_that_of_lsq_plus():
    """Bhalgat et al. 2020, equation 6, in codes: nothing inside, minus a step where a code is clamped."""
    x = torch.tensor([-9.0, 0.2, 9.0], dtype=torch.float64)
    zero_point = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    values = learned_quantize(x, torch.tensor(0.5, dtype=torch.float64), zero_point, QuantSpec(3, symmetric=False))
    found = [float(torch.autograd.grad(v, zero_point, retain_graph=True)[0]) for v in values]
    assert found == [-0.5, 0.0, -0.5]


def lsq_case(symmetric, model=None, run=None):
    """Ranges of Lp and of LSQ, found with the same data."""
    settings = dataclasses.replace(FAST, ranges="lp", lsq_iterations=150, lsq_learning_rate=0.05)
    fields = {"bits": 3, "symmetric": symmetric, "buckets": 2}
    make = model or denoiser
    start = calibrated(settings, run, make(), **fields)
    learned = calibrated(dataclasses.replace(settings, ranges="lsq"), run, make(), **fields)
    return start, learned, fields


@pytest.mark.parametrize("symmetric", [True, False])
def test_learned_steps_lose_less_in_the_output(symmetric):
    """On the residuals of the closed loop in which they were learned."""
    start, learned, fields = lsq_case(symmetric)
    one = calibrated(dataclasses.replace(FAST, ranges="lp", range_passes=1), **fields)
    # The second pass finds Lp's ranges on the trajectory of the first pass's, and learns on the trajectory of its own.
    assert found_ranges(one).keys() == found_ranges(start).keys()
    student = convert(denoiser(), config(**fields), True, ranges=found_ranges(start))
    seen = residuals(student, sampler())
    losses = {}
    for label, model in {"lp": start, "lsq": learned}.items():
        for name, operator in operators(model).items():
            spec, total = operator.activation_spec, 0.0
            for i, parts in seen[name].items():
                scale, zero_point = operator.calibrated.at(i)
                for x in parts:
                    error = learned_quantize(x, scale, zero_point, spec) - x
                    total += float(operator.product(error, with_bias=False).square().sum())
            losses[label, name] = total
    for name in operators(start):
        assert losses["lsq", name] <= losses["lp", name] * (1 + 1e-5), name
    assert sum(losses["lsq", n] for n in operators(start)) < 0.98 * sum(losses["lp", n] for n in operators(start))


def check_learned_zero_points_follow_their_scales():
    """Trap 6: a range that widens at its upper end only has zero points of its new scale."""
    start = CalibratedRange.from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), QuantSpec(4, symmetric=False), 5)
    factors = torch.tensor([[[0.0]], [[1.5]]])
    scale, zero_point = quantizer_of(factors, start, QuantSpec(4, symmetric=False))
    low = float(-start.zero_point * start.scale)
    assert float(-zero_point * scale) == pytest.approx(low)  # the lower end stays
    assert float((15 - zero_point) * scale) == pytest.approx(
        float((15 - start.zero_point) * start.scale) * 2.718**1.5, 1e-3
    )


def test_trap_6_learned_zero_points_follow_their_scales():
    check_learned_zero_points_follow_their_scales()


def test_trap_6_built_in_learned_scale_with_the_old_zero_point(monkeypatch):
    right = quantizer_of
    monkeypatch.setitem(
        globals(), "quantizer_of", lambda factors, start, spec: (right(factors, start, spec)[0], start.zero_point)
    )
    with pytest.raises(AssertionError):
        check_learned_zero_points_follow_their_scales()


class SplitSkip(nn.Module):
    """Two operators that share what was one with a concatenated input, of halves 30 times apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.skip = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.main(x) + self.skip(0.03 * x + 1)


def check_halves_of_a_split_skip_keep_their_own_quantizers():
    _, learned, _ = lsq_case(symmetric=False, model=SplitSkip, run=run_split)
    found = found_ranges(learned)
    ratio = found["main"].scale / found["skip"].scale
    assert (ratio > 10).all()
    for name, seen in residuals(learned, run_split).items():
        for i, parts in seen.items():
            scale, zero_point = found[name].at(i)
            values = torch.cat([x.flatten() for x in parts])
            reach = (15 - 8 - zero_point) * scale  # 3 bits: codes 0 to 7
            assert float(reach) < 4 * float(values.abs().max()), name
            assert float(-zero_point * scale) > -4 * float(values.abs().max()), name


def test_trap_6_halves_of_a_split_skip_keep_their_own_quantizers():
    check_halves_of_a_split_skip_keep_their_own_quantizers()


def test_trap_6_built_in_one_scale_copied_into_both_halves(monkeypatch):
    use = RangeCalibration.use

    def copying(self, found):
        found["skip"] = dataclasses.replace(found["skip"], scale=found["main"].scale)
        use(self, found)

    monkeypatch.setattr(RangeCalibration, "use", copying)
    with pytest.raises(AssertionError):
        check_halves_of_a_split_skip_keep_their_own_quantizers()


def test_learning_that_does_not_help_returns_where_it_began(monkeypatch):
    settings = dataclasses.replace(FAST, ranges="lsq", lsq_learning_rate=1.0, lsq_iterations=2)
    monkeypatch.setattr(lsq, "_output_error", worse_after_the_first_step(lsq._output_error))
    found = calibrated(settings, buckets=2)
    monkeypatch.undo()
    same(found_ranges(found), found_ranges(calibrated(dataclasses.replace(settings, ranges="lp"), buckets=2)))


def worse_after_the_first_step(original):
    starts = {}

    def error(operator, spec, scale, zero_point, rows):
        first = starts.setdefault(operator.name, scale.detach().clone())
        return original(operator, spec, scale, zero_point, rows) + 1e6 * (scale - first).abs().sum()

    return error
