"""Reuse schedules: blocks that are skipped, what stands in for them, and what stays exact."""

from __future__ import annotations

import copy
import dataclasses

import diffusers
import pytest
import torch
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.config.schedule import ReuseSchedule
from modiff.errors import ConfigError, TrajectoryError
from modiff.operators.reference import ReferenceOperator

FULL = QuantConfig(schedule=ReuseSchedule.preset("extrapolate-2"))
TIMES = [900, 700, 500, 300, 200, 100, 50]


class ResidualBlock(nn.Module):
    """x + l2(tanh(l1(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.l2(torch.tanh(self.l1(x)))


class AttentionBlock(ResidualBlock):
    """Named as a class of blocks that are found."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = AttentionBlock()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.block(self.first(x) + timestep / 1000)


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return (
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
        )
        .eval()
        .requires_grad_(False)
    )


def inputs(shape, dtype=torch.float32):
    """Inputs on a line in the time step, as branches change smoothly along a trajectory."""
    generator = torch.Generator().manual_seed(1)
    x, move = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [(x + 0.3 * (1 - t / 1000) * move).to(dtype) for t in TIMES]


def run(student, xs, times=TIMES, **kwargs):
    with modiff.trajectory(student, **kwargs) as trajectory:
        outputs = [student(x, torch.tensor(t)) for x, t in zip(xs, times, strict=False)]
        branch_bytes = trajectory.branch_bytes
    return [getattr(o, "sample", o) for o in outputs], trajectory, branch_bytes


@pytest.mark.parametrize("mode", ["reuse", "extrapolate"])
def test_equals_a_recurrence_written_by_hand(mode):
    model = net()
    xs = inputs((3, 6), torch.float64)
    schedule = ReuseSchedule(every=2, mode=mode)
    found, trajectory, _ = run(modiff.quantize(copy.deepcopy(model), QuantConfig(schedule=schedule)), xs)
    kept, expected = [], []
    for i, (x, t) in enumerate(zip(xs, TIMES, strict=True)):
        h = model.first(x) + t / 1000
        if i < 2 or i % 2 == 0:
            branch = model.block(h) - h
            kept = [*kept, (branch, t)][-2:]
        elif mode == "reuse":
            branch = kept[-1][0]
        else:
            (b0, t0), (b1, t1) = kept
            branch = b1 + (b1 - b0) * (t - t1) / (t1 - t0)
        expected.append(h + branch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)  # the slope is taken in float32
    assert trajectory.reused == 2
    assert trajectory.total == len(TIMES)


def test_skipped_operators_keep_their_state_and_catch_up():
    """What was skipped is in the next difference (equation 13): against the reference, told which evaluations ran."""
    model = net()
    spec = QuantSpec(6, "sample")
    config = QuantConfig(
        weight=QuantSpec(8, "channel"),
        activation=spec,
        modulation=Modulation(),
        schedule=ReuseSchedule(every=2, mode="reuse"),
    )
    xs = inputs((3, 6), torch.float64)
    found, trajectory, _ = run(modiff.quantize(copy.deepcopy(model), config), xs)
    make = lambda module: ReferenceOperator(module, config.weight, spec, Modulation())  # noqa: E731
    first, l1, l2 = make(model.first), make(model.block.l1), make(model.block.l2)
    branch = None
    for i, (x, t) in enumerate(zip(xs, TIMES, strict=True)):
        h = first.evaluate(x) + t / 1000
        if i < 2 or i % 2 == 0:
            branch = l2.evaluate(torch.tanh(l1.evaluate(h)))
        torch.testing.assert_close(found[i], h + branch, rtol=1e-6, atol=1e-6)  # weight scales are kept in float32
    assert trajectory.reused == 2
    assert trajectory.quantized == len(TIMES) - 1


@pytest.mark.parametrize("preset", [None, "w8a8-modiff", "w8a4-ptq"])
def test_a_schedule_that_skips_nothing_changes_no_bit(preset):
    base = QuantConfig() if preset is None else QuantConfig.preset(preset)
    xs = inputs((2, 2, 8, 8))
    never = ReuseSchedule(every=2, warmup=100)
    plain, _, _ = run(modiff.quantize(unet(), base), xs)
    found, trajectory, _ = run(modiff.quantize(unet(), _with(base, never)), xs)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    assert trajectory.reused == 0


def _with(config, schedule):
    return dataclasses.replace(config, schedule=schedule)


@pytest.mark.parametrize("preset", [None, "w8a8-modiff", "w8a7-modiff", "w8a4-ptq"])
@pytest.mark.parametrize("name", ["reuse-2", "extrapolate-3", "deep-reuse-2", "deep-extrapolate-2"])
def test_skipping_a_unet_is_counted_and_close(preset, name):
    base = QuantConfig() if preset is None else QuantConfig.preset(preset)
    xs = inputs((2, 2, 8, 8))
    plain, _, _ = run(modiff.quantize(unet(), base), xs)
    schedule = ReuseSchedule.preset(name)
    found, trajectory, branch_bytes = run(modiff.quantize(unet(), _with(base, schedule)), xs)
    skipped = [i for i in range(len(TIMES)) if schedule.skips("any", i)]
    assert trajectory.reused == len(skipped) > 0
    assert branch_bytes > 0
    for i, (a, b) in enumerate(zip(found, plain, strict=True)):
        error = (a - b).norm() / b.norm()
        assert error < 1  # a random network on a coarse grid of time steps: the recurrence above is the exact test
        assert i in skipped or i > skipped[0] or error == 0
    assert any(not torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_contexts_keep_branches_of_their_own():
    xs = inputs((2, 2, 8, 8))
    student = modiff.quantize(unet(), _with(QuantConfig.preset("w8a8-modiff"), ReuseSchedule.preset("reuse-2")))
    alone, _, _ = run(student, xs)
    with modiff.trajectory(student, contexts=("uncond", "cond")) as trajectory:
        both = []
        for x, t in zip(xs, TIMES, strict=True):
            student(-x, torch.tensor(t))
            both.append(student(x, torch.tensor(t)).sample)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert trajectory.reused == 4


def test_the_last_half_goes_on_where_guidance_ends():
    xs = inputs((4, 2, 8, 8))
    student = modiff.quantize(unet(), _with(QuantConfig.preset("w8a8-modiff"), ReuseSchedule.preset("reuse-2")))
    whole, _, _ = run(student, xs)
    halved, _, _ = run(student, [*xs[:3], *(x[2:] for x in xs[3:])], guidance_may_end=True)
    assert all(torch.allclose(a[-2:], b[-2:], atol=1e-6) for a, b in zip(halved, whole, strict=True))
    with pytest.raises(TrajectoryError, match="has shape"):
        run(student, [*xs[:3], *(x[2:] for x in xs[3:])])


def test_copies_saved_and_restored_students(tmp_path):
    xs = inputs((2, 2, 8, 8))
    teacher = unet()
    student = modiff.quantize(
        copy.deepcopy(teacher), _with(QuantConfig.preset("w8a8-modiff"), ReuseSchedule.preset("reuse-2"))
    )
    expected, _, _ = run(student, xs)
    copied = copy.deepcopy(student)
    found, trajectory, _ = run(copied, xs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert trajectory.reused == 2
    modiff.save(student, tmp_path / "student")
    loaded = modiff.load(tmp_path / "student", unet())
    found, trajectory, _ = run(loaded, xs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert trajectory.reused == 2
    modiff.restore(student)
    assert torch.equal(student(xs[0], 5).sample, teacher(xs[0], 5).sample)


def test_a_calibrated_table_names_evaluations():
    schedule = ReuseSchedule(skipped={"mid_block.resnets.0": [3, 4]}, mode="reuse", length=7)
    assert [schedule.skips("mid_block.resnets.0", t) for t in range(7)] == [False] * 3 + [True] * 2 + [False] * 2
    student = modiff.quantize(unet(), QuantConfig(schedule=schedule))
    _, trajectory, _ = run(student, inputs((2, 2, 8, 8)))
    assert trajectory.reused == 2
    assert QuantConfig.from_dict(dataclasses.asdict(QuantConfig(schedule=schedule))).schedule == schedule


def test_a_threshold_skips_what_hardly_changes():
    xs = inputs((2, 2, 8, 8))
    still = [xs[0]] * len(TIMES)
    student = modiff.quantize(unet(), QuantConfig(schedule=ReuseSchedule(threshold=10.0, mode="reuse", warmup=1)))
    _, trajectory, _ = run(student, still)
    assert trajectory.reused == len(TIMES) - 1
    student = modiff.quantize(unet(), QuantConfig(schedule=ReuseSchedule(threshold=1e-9, mode="reuse", warmup=1)))
    _, trajectory, _ = run(student, xs)
    assert trajectory.reused == 0


def test_compiled_stages_agree():
    xs = inputs((2, 2, 8, 8))
    config = _with(QuantConfig.preset("w8a7-modiff"), ReuseSchedule.preset("extrapolate-2"))
    expected, _, _ = run(modiff.quantize(unet(), config), xs)
    found, trajectory, _ = run(modiff.compile(modiff.quantize(unet(), config)), xs)
    assert trajectory.reused == 2
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()  # a graph fuses differently, so that single codes differ by one
    with pytest.raises(ConfigError, match="has a reuse schedule, which mode 'whole' cannot follow"):
        modiff.compile(modiff.quantize(unet(), config), "whole")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "neither every, skipped nor threshold"),
        ({"every": 2, "threshold": 0.1}, "every and threshold; give one"),
        ({"every": 1}, "every is 1; allowed are whole numbers, 2 or more"),
        ({"every": 2, "warmup": 1}, "warmup is 1; allowed are whole numbers, 2 or more"),
        ({"every": 2, "mode": "guess"}, "mode is 'guess'; allowed are reuse, extrapolate"),
        ({"every": 2, "part": "half"}, "part is 'half'; allowed are branches, deep"),
        ({"every": 2, "cooldown": 1}, "cooldown needs length"),
        ({"every": 2, "blocks": ()}, "give patterns of block names"),
        ({"threshold": -1.0}, "give a positive share"),
        ({"skipped": {"a": [0]}}, "always computed"),
        ({"skipped": {"a": [9]}, "length": 5}, "The schedule is longer than the sampler"),
        ({"skipped": 3}, "give evaluations by block name"),
    ],
)
def test_impossible_schedules_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        ReuseSchedule(**fields)


def test_blocks_that_match_nothing_are_refused_before_anything_is_swapped():
    model = unet()
    with pytest.raises(ConfigError, match="matches no block of UNet2DModel. Its blocks are"):
        modiff.quantize(model, QuantConfig(schedule=ReuseSchedule(every=2, blocks=("nothing.*",))))
    with pytest.raises(ConfigError, match="names block 'gone', which UNet2DModel does not have"):
        modiff.quantize(model, QuantConfig(schedule=ReuseSchedule(skipped={"gone": [3]})))
    assert not hasattr(model, "_modiff_state")


def test_calls_outside_a_trajectory_and_longer_ones_are_refused():
    xs = inputs((2, 2, 8, 8))
    student = modiff.quantize(unet(), FULL)
    with pytest.raises(TrajectoryError, match="has a reuse schedule and was called outside a trajectory"):
        student(xs[0], 5)
    student = modiff.quantize(unet(), QuantConfig(schedule=ReuseSchedule(every=2, length=4)))
    with pytest.raises(TrajectoryError, match="longer than the reuse schedule, which was made for 4 evaluations"):
        run(student, xs)
    with pytest.raises(ConfigError, match="made for trajectories of 4 evaluations, and the sampler makes 7"):
        ReuseSchedule(every=2, length=4).check_length(7)


def test_cost_counts_skipped_products_as_zero_and_kept_branches():
    args = torch.randn(2, 2, 8, 8), torch.tensor(5)
    base = QuantConfig.preset("w8a8-modiff")
    plain = modiff.cost(modiff.quantize(unet(), base), *args, evaluations=10)
    schedule = ReuseSchedule.preset("extrapolate-2")
    student = modiff.quantize(unet(), _with(base, schedule))
    found = modiff.cost(student, *args, evaluations=10)
    inside = {r.name: r for r in found.operators if ".resnets." in r.name or ".attentions." in r.name}
    skipped = sum(schedule.skips("any", t) for t in range(10))
    for row in plain.operators:
        other = next(r for r in found.operators if r.name == row.name)
        at_low = 0 if row.name not in inside or row.name.endswith("conv_shortcut") else skipped
        assert row.bops - other.bops == pytest.approx(row.macs * 8 * 8 * at_low / 10)
    assert found.other_bops < plain.other_bops, "attention products inside skipped blocks"
    _, trajectory, branch_bytes = run(student, inputs((2, 2, 8, 8)))
    extra = (found.state_mib_per_image - plain.state_mib_per_image) * 2**20 * 2
    assert extra == pytest.approx(branch_bytes)


def test_describe_names_the_schedule():
    student = modiff.quantize(unet(), _with(QuantConfig.preset("w8a8-modiff"), ReuseSchedule.preset("extrapolate-3")))
    assert "blocks are computed in every 3rd evaluation and extrapolated between" in str(modiff.describe(student))
