"""Operators in halves (Q-Diffusion) and migrated scales (SmoothQuant): the same function, smaller errors, and back."""

import dataclasses

import pytest
import torch
from small_models import config, noise
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.prepare.smoothing import find_divisors
from modiff.calibration.prepare.splits import find_splits
from modiff.config.quant import QuantConfig, QuantSpec, Rule, Split
from modiff.errors import CalibrationError, CheckpointError, ConfigError
from modiff.kernels import onednn
from modiff.operators.rewrites import SplitOperator, rewrite, undo
from modiff.student.swap import convert, operators

SETTINGS = CalibrationSettings(
    evaluations=2, positions=200, samples=8, batch_size=4, iterations=5, tuning_iterations=2, stage_size=4
)


class Skips(nn.Module):
    """A decoder whose convolution and Linear get the very concatenations; one behind a norm does not."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.shortcut = nn.Conv2d(16, 8, 1)
        self.behind = nn.Conv2d(16, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 16)
        self.mix = nn.Linear(12, 8)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv_in(x)
        joined = torch.cat([0.05 * h, 3.0 * h.square()], dim=1)
        time = self.mix(torch.cat([self.time(t), t], -1))
        return self.conv_out(self.shortcut(joined) + self.behind(self.norm(joined)) + time[:, :, None, None])


def skips(seed=0):
    torch.manual_seed(seed)
    return Skips().eval().requires_grad_(False)


class Outliers(nn.Module):
    """Two Linears behind a norm of which two channels are a hundred times larger than the rest."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x, t):
        return self.second(nn.functional.silu(self.first(self.norm(x)))) + t


def outliers():
    torch.manual_seed(1)
    model = Outliers().eval().requires_grad_(False)
    model.norm.weight[3], model.norm.weight[7] = 100.0, 60.0
    model.first.weight[:, [3, 7]] /= 50
    return model


def tokens(evaluations=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 5, 16, generator=generator), torch.zeros(())) for _ in range(evaluations)]


def sampler(inputs):
    def run(student):
        with modiff.trajectory(student):
            for args in inputs:
                student(*args)

    return run


def outputs(student, inputs):
    with modiff.trajectory(student):
        return torch.stack([student(*args) for args in inputs])


def split_config(preset="w4a4-modiff-paper"):
    return dataclasses.replace(config(preset), splits=(Split("shortcut", 8), Split("mix", 8)))


# --- halves -----------------------------------------------------------------------------------------------------------


def test_splits_are_found_where_the_input_is_the_very_concatenation():
    teacher = skips()
    assert find_splits(teacher, config(), sampler(noise(3))) == (Split("mix", 8), Split("shortcut", 8))
    assert type(teacher.shortcut) is nn.Conv2d
    skipped = dataclasses.replace(config(), rules=(Rule("mix", skip=True),))
    assert find_splits(teacher, skipped, sampler(noise(3))) == (Split("shortcut", 8),)
    with pytest.raises(CalibrationError, match="never called the student"):
        find_splits(teacher, config(), lambda student: None)


def test_what_joins_no_features_is_not_split():
    """The sine and cosine of a time embedding have one range; what an operator made of them counts again."""

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.Linear(8, 8), nn.Linear(12, 3)

        def forward(self, x, t):
            x = self.conv(x)  # features are there before the embedding, which does not depend on them
            joined = torch.cat([t.sin(), t.cos()], dim=-1)
            e = self.second(torch.cat([self.first(torch.cat([joined[:, 4:], joined[:, :4]], dim=-1)).relu(), t], -1))
            return x + e[:, :, None, None]

    torch.manual_seed(0)
    teacher = Timed().eval().requires_grad_(False)
    assert find_splits(teacher, config(), sampler(noise(2))) == (Split("second", 8),)


def test_halves_are_the_original_in_full_precision_and_go_back():
    teacher, args = skips(), noise(1)[0]
    before, weight = teacher(*args), teacher.shortcut
    assert rewrite(teacher, split_config())
    assert not rewrite(teacher, split_config())
    assert isinstance(teacher.shortcut, SplitOperator)
    assert teacher.shortcut.in_channels == 16  # other code reads the original's attributes
    assert teacher.shortcut.first.weight.data_ptr() == weight.weight.data_ptr()  # no copy
    assert torch.allclose(teacher(*args), before, atol=1e-5)
    undo(teacher)
    assert teacher.shortcut is weight
    assert torch.equal(teacher(*args), before)


@pytest.mark.parametrize("preset", ["w4a4-modiff-paper", "w4a4-ptq-paper"])
def test_each_half_has_its_own_scales_and_state(preset):
    student = modiff.quantize(skips(), split_config(preset))
    found = operators(student)
    assert {"shortcut.first", "shortcut.second", "mix.first", "mix.second"} < set(found)
    assert {row.name for row in modiff.describe(student)} == set(found)
    whole = operators(modiff.quantize(skips(), config(preset)))["shortcut"]
    halves = [found[f"shortcut.{half}"] for half in ("first", "second")]
    for half, weight in zip(halves, whole.module.weight.split(8, dim=1), strict=True):
        assert torch.allclose(half.packed.scale.flatten() * 7, weight.abs().amax(dim=(1, 2, 3)))
    assert halves[1].module.bias is None
    if "modiff" in preset:
        with modiff.trajectory(student) as counts:
            for args in noise(2):
                student(*args)
            caches = [counts.caches[half.name][0] for half in halves]
            assert [cache.a_hat.shape[1] for cache in caches] == [8, 8]


def errors_of(student, teacher):
    inputs = noise(4, 4, 9)
    reference = torch.stack([teacher(*args) for args in inputs])
    return (outputs(student, inputs) - reference).square().mean().item()


def test_halves_lose_less_where_their_ranges_differ():
    def make():
        model = skips()
        model.shortcut.weight[:, :8] *= 20  # the small half matters as much as the large one
        return model

    spec = QuantSpec(4, "sample", symmetric=False)  # of this one operator: others would drown it
    base = QuantConfig(rules=(Rule("shortcut", activation=spec),))
    whole = errors_of(modiff.quantize(make(), base), make())
    halves = errors_of(modiff.quantize(make(), dataclasses.replace(base, splits=(Split("shortcut", 8),))), make())
    assert halves < 0.7 * whole


def test_trap_6_scale_and_zero_point_of_one_half_in_the_other():
    """One scale copied into both halves, or a scale without its zero point: either shows as a much larger error."""
    base = QuantConfig(weight=QuantSpec(4, "channel", symmetric=False), splits=(Split("shortcut", 8),))
    torch.manual_seed(0)
    teacher = skips()
    teacher.shortcut.weight[:, :8] = 0.01 * teacher.shortcut.weight[:, :8].abs()  # small, and of one sign

    def error(scale_of=None, zero_of=None):
        student = convert(shared(teacher), base, True)
        first, second = (operators(student)[f"shortcut.{half}"] for half in ("first", "second"))
        weight = first.packed.unpack().dequantize()
        if scale_of:
            packed = dataclasses.replace(first.packed, scale=second.packed.scale)
            if zero_of:
                packed = dataclasses.replace(packed, zero_point=second.packed.zero_point)
            first.use(packed)
            weight = first.packed.unpack().dequantize()
        return (weight - teacher.shortcut.weight[:, :8]).norm() / teacher.shortcut.weight[:, :8].norm()

    right = error()
    assert right < 0.1
    assert error(scale_of="second") > 5 * right
    assert error(scale_of="second", zero_of="second") > 5 * right


def shared(model):
    from modiff.student.copies import shared_copy

    return shared_copy(model)


@pytest.mark.parametrize(
    ("split", "match"),
    [
        (Split("norm", 8), "'norm' at channel 8, but that is GroupNorm"),
        (Split("nothing", 8), "that is no module of this model"),
        (Split("shortcut", 16), "that is Conv2d of 16 input channels"),
    ],
)
def test_impossible_splits_are_refused_and_change_nothing(split, match):
    teacher = skips()
    with pytest.raises(ConfigError, match=match):
        modiff.quantize(teacher, dataclasses.replace(config(), splits=(Split("mix", 8), split)))
    assert type(teacher.mix) is nn.Linear


def test_an_error_after_the_split_leaves_the_model_as_it_was():
    teacher = skips()
    with pytest.raises(ConfigError, match="matches no operator"):
        modiff.quantize(teacher, dataclasses.replace(split_config(), rules=(Rule("nothing", skip=True),)))
    assert type(teacher.shortcut) is nn.Conv2d


def test_rules_for_the_operator_hold_for_its_halves():
    rules = (Rule("shortcut", weight=QuantSpec(8, "channel")), Rule("mix.second", skip=True))
    found = operators(modiff.quantize(skips(), dataclasses.replace(split_config(), rules=rules)))
    assert [found[f"shortcut.{half}"].weight_spec.bits for half in ("first", "second")] == [8, 8]
    assert "mix.first" in found
    assert "mix.second" not in found


def test_fields_are_checked_and_read_from_dictionaries():
    assert QuantConfig.from_dict(dataclasses.asdict(split_config())) == split_config()
    with pytest.raises(ConfigError, match="at is 0"):
        Split("a", 0)
    with pytest.raises(ConfigError, match="name is 3"):
        Split(3, 1)
    with pytest.raises(ConfigError, match="splits is 'a'; give a list of Split"):
        QuantConfig(splits="a")
    with pytest.raises(ConfigError, match="smoothing is 2"):
        CalibrationSettings(smoothing=2)
    with pytest.raises(ConfigError, match="split_concatenations is 1"):
        CalibrationSettings(split_concatenations=1)


@pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN operators")
@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a7-ptq-paper"])
def test_halves_and_divided_inputs_run_in_integers_like_all_others(preset):
    found, divisors = {}, {"time": torch.tensor([0.5, 1.0, 2.0, 4.0])}
    for backend in ("onednn", "simulate"):
        asked = dataclasses.replace(split_config(preset), smoothed=("time",), backend=backend)
        student = convert(skips(), asked, True, divisors=divisors)
        assert {operator.backend for operator in operators(student).values()} == {backend}
        assert {row.backend for row in modiff.describe(student)} == {backend}
        found[backend] = outputs(student, noise(4))
        assert {operator.region.execution.backend.name for operator in operators(student).values()} == {backend}
    assert {"shortcut.first", "shortcut.second", "time.inner"} < set(operators(student))
    assert (found["onednn"] - found["simulate"]).norm() < 0.02 * found["simulate"].norm()


def test_a_backend_that_is_refused_leaves_the_model_as_it_was():
    teacher = skips()
    asked = dataclasses.replace(split_config(), activation=QuantSpec(4, "channel"), backend="onednn")
    with pytest.raises(ConfigError, match="backend 'onednn' cannot run operator"):
        modiff.quantize(teacher, asked)
    assert type(teacher.shortcut) is nn.Conv2d
    assert type(teacher.mix) is nn.Linear


# --- both: save, load, restore ----------------------------------------------------------------------------------------


def calibrated(make, inputs, method="gptq", keep_teacher=True, preset="w4a4-modiff-paper"):
    settings = dataclasses.replace(SETTINGS, smoothing=0.5, split_concatenations=True)
    return calibrate(make(), config(preset), sampler(inputs), method, settings=settings, keep_teacher=keep_teacher)


@pytest.mark.parametrize("method", ["nearest", "gptq", "brecq"])
def test_calibration_splits_smooths_saves_and_restores(method, tmp_path):
    inputs = noise(4, 2)
    teacher, student = skips(), calibrated(skips, inputs, method)
    assert {"shortcut.first", "shortcut.second", "mix.first", "time.inner"} < set(operators(student))
    expected = outputs(student, inputs)
    modiff.save(student, tmp_path / "s")
    loaded = modiff.load(tmp_path / "s", skips(1))
    assert torch.equal(outputs(loaded, inputs), expected)
    with torch.device("meta"):
        empty = skips()
    assert torch.equal(outputs(modiff.load(tmp_path / "s", empty), inputs), expected)
    for found, given in ((student, None), (loaded, teacher)):
        restored = modiff.restore(found, given)
        assert type(restored.shortcut) is nn.Conv2d
        assert all(
            torch.equal(a, b)
            for a, b in zip(restored.state_dict().values(), teacher.state_dict().values(), strict=True)
        )
        assert torch.equal(restored(*inputs[0]), teacher(*inputs[0]))


def test_a_dropped_teacher_comes_back_from_another_copy(tmp_path):
    inputs = noise(3, 2)
    student = calibrated(skips, inputs, "nearest", keep_teacher=False)
    assert student.shortcut.original.weight.numel() == 0
    with pytest.raises(ConfigError, match="keep_teacher=False"):
        modiff.restore(student)
    restored = modiff.restore(student, skips())
    assert torch.equal(restored(*inputs[0]), skips()(*inputs[0]))


def test_loading_into_another_architecture_leaves_it_as_it_was(tmp_path):
    modiff.save(modiff.quantize(skips(), split_config()), tmp_path / "s")
    other = skips()
    other.conv_out = nn.Conv2d(8, 4, 3, padding=1)
    with pytest.raises(CheckpointError, match="another architecture"):
        modiff.load(tmp_path / "s", other)
    assert type(other.shortcut) is nn.Conv2d
    del other.shortcut
    with pytest.raises(CheckpointError, match="no module of this model"):
        modiff.load(tmp_path / "s", other)


# --- migrated scales --------------------------------------------------------------------------------------------------


def test_a_smoothed_model_is_the_original_in_full_precision():
    teacher = outliers()
    before = teacher(*tokens()[0])
    divisors = {"first": torch.rand(16) + 0.5, "second": torch.rand(24) + 0.5}
    rewrite(teacher, QuantConfig(smoothed=("first", "second")), divisors)
    assert torch.allclose(teacher.first.inner.weight, outliers().first.weight * divisors["first"])
    assert torch.allclose(teacher(*tokens()[0]), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["w8a4-ptq-paper", "w8a4-modiff-paper"])
def test_smoothing_lowers_the_error_where_channels_are_outliers(preset):
    reference = torch.stack([outliers()(*args) for args in tokens(seed=5)])
    errors = []
    for smoothing in (None, 0.5):
        settings = dataclasses.replace(SETTINGS, smoothing=smoothing)
        student = calibrate(outliers(), config(preset), sampler(tokens()), "nearest", settings=settings)
        errors.append((outputs(student, tokens(seed=5)) - reference).square().mean().item())
    assert errors[1] < 0.5 * errors[0]


class Two(Reducer):
    """The second of two processes, whose run is dealt nothing: what the first one found is all there is."""

    rank, world_size = 1, 2

    def __init__(self, others):
        self.others = iter(others)

    def gather(self, value):
        return [next(self.others), value]


def test_processes_share_splits_and_the_largest_inputs():
    alone = find_splits(skips(), config(), sampler(noise(3)))
    seen = {"shortcut": {8}, "mix": {8}, "conv_in": {None}}
    assert set(find_splits(skips(), config(), lambda student: None, Two([(True, seen)]))) == set(alone)
    with pytest.raises(CalibrationError, match="never called the student"):
        find_splits(skips(), config(), lambda student: None, Two([(False, {})]))

    def divisors(inputs, reducer=None):
        model = outliers()
        loop = ClosedLoop(convert(shared(model), config("w8a4-ptq-paper"), True), model, sampler(inputs), reducer)
        return find_divisors(loop, 0.5)

    larger = {"first": torch.zeros(16), "second": torch.zeros(24)}
    larger["first"][5] = 1e4
    one, both = divisors(tokens()), divisors(tokens(), Two([larger]))
    assert torch.equal(one["second"], both["second"])
    assert (both["first"] / one["first"]).argmax() == 5
    nothing = divisors([], Two([larger]))
    assert set(nothing) == set(larger)


def test_smoothing_without_a_calibration_is_refused():
    with pytest.raises(ConfigError, match="'first', whose divisors are not known"):
        modiff.quantize(outliers(), dataclasses.replace(config(), smoothed=("first",)))
    with pytest.raises(ConfigError, match="but smoothing is None"):
        calibrate(outliers(), dataclasses.replace(config(), smoothed=("first",)), sampler(tokens()))
    with pytest.raises(ConfigError, match="need data"):
        calibrate(outliers(), config(), method="nearest", settings=dataclasses.replace(SETTINGS, smoothing=0.5))
    with pytest.raises(ConfigError, match="'norm', but that is LayerNorm"):
        rewrite(outliers(), QuantConfig(smoothed=("norm",)), {"norm": torch.ones(16)})
