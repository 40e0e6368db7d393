"""quantize, describe and restore: what is swapped, what is refused, and that errors change nothing."""

import copy
import re

import pytest
import torch
from small_models import Attention, config, denoiser, drift, noise, run, student, tiny_unet
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import ConfigError
from modiff.operators.adapters import find_adapter
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.student.swap import operators

BASE = QuantConfig.preset("w8a4-modiff-paper")


def with_rules(*rules):
    return QuantConfig(BASE.weight, BASE.activation, BASE.modulation, rules)


def rows(model, *rules):
    return {row.name: row for row in modiff.describe(modiff.quantize(model, with_rules(*rules)))}


def unchanged(model, before):
    names = [(name, type(m)) for name, m in model.named_modules()]
    assert names == before[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[1].values(), strict=True))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any("modiff" in name for name in vars(model))


def snapshot(model):
    return [(name, type(m)) for name, m in model.named_modules()], copy.deepcopy(model.state_dict())


def test_quantize_swaps_every_operator_in_place_and_returns_the_module():
    model = denoiser()
    assert modiff.quantize(model, BASE) is model
    assert {type(model.conv_in), type(model.time), type(model.conv_out)} == {ModulatedOperator}
    assert type(model.norm) is nn.GroupNorm
    assert list(operators(model)) == ["conv_in", "time", "conv_out"]
    assert not model.conv_in.training


def test_plain_quantization_swaps_in_plain_operators():
    assert type(student("w8a4-ptq-paper").conv_in) is QuantizedOperator


def test_quantized_operators_still_look_like_their_originals():
    model = student()
    assert model.conv_in.in_channels == 3
    assert model.conv_in.weight.dtype == torch.float32
    assert model.conv_in.bias.shape == (8,)
    assert model.conv_out.bias is None
    assert not hasattr(model.conv_in, "nonsense")


def test_the_last_matching_rule_wins_and_replaces_whole_specs():
    table = rows(
        denoiser(),
        Rule("conv_*", weight=QuantSpec(3, "channel"), activation=QuantSpec(6, "channel")),
        Rule("conv_out", weight=QuantSpec(5), modulation=None),
    )
    assert table["conv_in"].weight == QuantSpec(3, "channel")
    assert table["conv_in"].activation == QuantSpec(6, "channel")
    assert table["conv_in"].modulation == Modulation()
    assert table["conv_out"].weight == QuantSpec(5)
    assert table["conv_out"].activation == BASE.activation  # inherited from the config, not from the earlier rule
    assert table["conv_out"].modulation is None
    assert table["time"].rule is None
    assert [table[name].rule for name in ("conv_in", "conv_out")] == ["conv_*", "conv_out"]


def test_rules_for_full_precision_types_and_skipping():
    model = denoiser()
    table = rows(
        model, Rule("*", type="linear", weight=None), Rule("re:conv_(in)", activation=None), Rule("conv_out", skip=True)
    )
    assert table["time"].weight is None
    assert table["time"].activation == BASE.activation
    assert table["conv_in"].activation is None
    assert table["conv_in"].modulation is None
    assert table["conv_out"].skipped == "the rule says skip"
    assert type(model.conv_out) is nn.Conv2d
    assert type(model.conv_in) is QuantizedOperator


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("conv_inn"),
            "Rule pattern 'conv_inn' matches no operator. Names here are like: conv_in, time, conv_out.",
        ),
        (
            Rule("conv_in", type="linear"),
            "Rule pattern 'conv_in' matches no operator of type 'linear'. Names here are like",
        ),
        (Rule("norm", skip=True), "Rule pattern 'norm' matches no operator."),
        (
            Rule("*", activation=QuantSpec(4, "token")),
            "Operator 'conv_in' (Conv2d): granularity 'token' exists for Linear operators only. Add a rule for the "
            "convolutions, for example Rule('*', type='conv', activation=QuantSpec(bits=..., granularity='sample')).",
        ),
    ],
)
def test_rules_that_cannot_hold_are_refused_and_change_nothing(rule, message):
    model = denoiser()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        modiff.quantize(model, with_rules(rule))
    unchanged(model, before)


@pytest.mark.parametrize("keep_teacher", [True, False])
def test_a_weight_with_nan_is_refused_by_name_and_changes_nothing(keep_teacher):
    model = denoiser()
    model.conv_out.weight[1, 2, 0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(
        ConfigError, match=r"weight of operator 'conv_out' holds NaN or Inf.*Rule\('conv_out', skip=True\)"
    ):
        modiff.quantize(model, BASE, keep_teacher=keep_teacher)
    unchanged(model, before)
    modiff.quantize(model, with_rules(Rule("conv_out", skip=True)), keep_teacher=keep_teacher)


def test_hooks_that_would_be_bypassed_are_refused():
    model = denoiser()
    before = snapshot(model)
    handle = model.time.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ConfigError, match=r"'time' \(Linear\) has forward hooks.*Remove them.*Rule\('time', skip=True\)"
    ):
        modiff.quantize(model, BASE)
    handle.remove()
    unchanged(model, before)


@pytest.mark.parametrize("skip_all", [False, True])
def test_a_student_is_not_quantized_again(skip_all):
    model = modiff.quantize(denoiser(), with_rules(Rule("*", skip=skip_all)))
    with pytest.raises(ConfigError, match="is a student already. Call modiff.restore"):
        modiff.quantize(model, BASE)
    if not skip_all:
        with pytest.raises(ConfigError, match="is a student already"):
            modiff.quantize(nn.Sequential(model), BASE)
    modiff.quantize(modiff.restore(model), BASE)


def test_models_without_linear_operators_are_refused():
    with pytest.raises(
        ConfigError, match=r"^Sequential has no linear operators .*\(Linear, Conv1d to Conv3d, ConvTranspose1d"
    ):
        modiff.quantize(nn.Sequential(nn.ReLU(), nn.Bilinear(1, 1, 2)), BASE)


def test_a_bare_operator_is_refused():
    with pytest.raises(
        ConfigError, match=r"A bare Linear cannot be swapped in place. Wrap it: nn.Sequential\(operator\)"
    ):
        modiff.quantize(nn.Linear(2, 2), BASE)


def test_what_is_not_a_config_is_refused():
    with pytest.raises(ConfigError, match="config is 8; give a QuantConfig or the name of a preset, for example"):
        modiff.quantize(denoiser(), 8)


def test_a_preset_is_taken_by_its_name():
    named, made = (
        modiff.quantize(denoiser(), "w8a4-modiff-paper"),
        modiff.quantize(denoiser(), config("w8a4-modiff-paper")),
    )
    for found, wanted in zip(run(named, noise(3))[0], run(made, noise(3))[0], strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(ConfigError, match="unknown preset 'w9a9-modiff'"):
        modiff.quantize(denoiser(), "w9a9-modiff")


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    """Another class, the same forward."""


def test_operators_that_cannot_be_swapped_are_listed_with_the_reason():
    model = nn.Sequential(Scaled(4, 4), Named(4, 4), nn.Flatten(), nn.Bilinear(4, 4, 1))
    patched = nn.Linear(1, 1)
    patched.forward = lambda x: x
    model.append(patched)
    table = rows(model)
    assert table["0"].skipped == "Scaled overrides the forward of Linear"
    assert table["1"].skipped is None
    assert table["3"].skipped == "no adapter for this type"
    assert table["4"].skipped == "Linear overrides the forward of Linear"


def test_describe_prints_a_table():
    text = str(modiff.describe(modiff.quantize(denoiser(), with_rules(Rule("time", skip=True)))))
    lines = text.splitlines()
    assert (
        " ".join(lines[0].split()) == "operator type weight activation modulation backend special rule skipped because"
    )
    assert "8 bit, channel, symmetric" in lines[1]
    assert "4 bit, sample, asymmetric" in lines[1]
    assert "compensated, full warm-up" in lines[1]
    assert "onednn" in lines[1]
    assert lines[2].endswith("time  the rule says skip")
    assert len(lines) == 4


def test_describe_shows_clips_refreshes_and_full_precision():
    rule = Rule("time", weight=None, activation=QuantSpec(3, clip=0.8), modulation=Modulation(False, refresh_every=5))
    line = str(modiff.describe(modiff.quantize(denoiser(), with_rules(rule)))).splitlines()[2]
    for text in (
        "full precision",
        "3 bit, tensor, symmetric, clip 0.8",
        "uncompensated, full warm-up, refresh every 5",
    ):
        assert text in line


def test_attention_of_pytorch_is_listed_as_not_quantized():
    """Its modules take the weights of their Linears, so a swapped one would be used in full precision, or fail."""
    torch.manual_seed(0)
    model = Attention().eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    table = rows(model)
    assert table["attention.out_proj"].skipped == "nn.MultiheadAttention uses its weight directly"
    assert table["attention"].skipped == "no adapter for this type"
    assert "fast path" in table["layer.linear1"].skipped
    assert table["out"].skipped is None
    outputs, counts = run(model, [(x,), (x,)])
    assert counts.quantized == 1
    torch.testing.assert_close(outputs[0], expected, rtol=0.1, atol=0.05)
    assert torch.equal(modiff.restore(model)(x), expected)


def test_weights_without_kept_teacher_share_memory_and_leave_tied_modules_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    tied = model[0].weight
    before = tied.detach().clone()
    modiff.quantize(model, with_rules(Rule("1", skip=True)), keep_teacher=False)
    assert model[1].weight is tied
    assert torch.equal(tied, before)
    operator = model[0]
    assert operator.weight.data_ptr() == operator._quantized_weight.data_ptr()
    model.to(torch.float64).to(torch.float32)
    assert operator.weight.data_ptr() == operator._quantized_weight.data_ptr()
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(nn.functional.linear(x, operator.weight, operator.bias), operator.product(x, with_bias=True))


def test_restore_without_kept_teacher_needs_one_that_fits():
    model = modiff.quantize(denoiser(), BASE, keep_teacher=False)
    with pytest.raises(
        ConfigError, match=r"made with keep_teacher=False. Give the teacher: restore\(student, teacher=...\)"
    ):
        modiff.restore(model)
    wrong = denoiser()
    wrong.conv_out = nn.Conv2d(8, 3, 1)
    for teacher in (wrong, student(), nn.Sequential()):
        with pytest.raises(
            ConfigError, match=r"no full-precision operator '(conv_in|conv_out)' of the student's shape"
        ):
            modiff.restore(model, teacher=teacher)
    assert run(model, noise(2))[1].total == 2
    modiff.restore(model, teacher=denoiser())


def test_restore_takes_given_weights_even_if_its_own_were_kept():
    model = modiff.restore(student(seed=0), teacher=denoiser(seed=1))
    assert torch.equal(model.conv_in.weight, denoiser(seed=1).conv_in.weight)


@pytest.mark.parametrize("keep_teacher", [True, False])
def test_weights_loaded_into_a_student_are_quantized(keep_teacher):
    """Otherwise it would go on with the old ones, or with those in full precision."""
    model = modiff.quantize(denoiser(seed=0), config("w3a32-ptq-paper"), keep_teacher=keep_teacher)
    other = modiff.quantize(denoiser(seed=1), config("w3a32-ptq-paper"))
    args = noise(1)[0]
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(*args), other(*args))
    copied = copy.deepcopy(model)
    copied.load_state_dict(modiff.quantize(denoiser(seed=2), config("w3a32-ptq-paper")).state_dict())
    assert torch.equal(model(*args), other(*args))
    assert not torch.equal(copied(*args), other(*args))


def test_models_made_in_inference_mode_can_be_quantized():
    with torch.inference_mode():
        model = modiff.quantize(denoiser(), BASE)
        expected, _ = run(model, noise(3))
    with torch.no_grad():
        found, _ = run(model, noise(3))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_operators_of_other_dimensions_run():
    for make, shape in [(lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)), (lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4))]:
        model = modiff.quantize(nn.Sequential(make()).requires_grad_(False), BASE)
        outputs, counts = run(model, [(x,) for x in drift(shape, 3)])
        assert counts.quantized == 2
        assert outputs[0].ndim == len(shape)


def test_adapters_refuse_nothing_else():
    assert find_adapter(nn.Linear(1, 1)).kind == "linear"
    assert find_adapter(nn.Conv3d(1, 1, 1)).kind == "conv"
    assert find_adapter(nn.BatchNorm2d(1)) is None


def test_parametrized_weights_are_quantized_as_they_are():
    torch.manual_seed(0)
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(linear).requires_grad_(False)
    x = torch.randn(2, 4)
    expected = model(x)
    modiff.quantize(model, QuantConfig(QuantSpec(8, "channel")), keep_teacher=True)
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.02)
    assert torch.equal(modiff.restore(model)(x), expected)


def test_a_unet_of_diffusers_is_quantized_unchanged():
    unet = tiny_unet()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([500, 500])
    expected = unet(x, t).sample
    linear = [name for name, m in unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    model = modiff.quantize(unet, QuantConfig.preset("w8a6-modiff-paper"))
    assert [row.name for row in modiff.describe(model)] == linear
    assert all(row.skipped is None for row in modiff.describe(model))
    inputs = [(sample, t - 10 * i) for i, sample in enumerate(drift((2, 1, 8, 8), 6))]
    with modiff.trajectory(model) as counts:
        outputs = [model(*args).sample for args in inputs]
    assert (counts.total, counts.quantized) == (6, 5)
    modiff.restore(model)
    for args, output in zip(inputs, outputs, strict=True):
        wanted = model(*args).sample
        assert (output - wanted).norm() < 0.05 * wanted.norm()
    assert torch.equal(model(x, t).sample, expected)
    assert modiff.describe(modiff.quantize(unet, config())).rows[0].name == linear[0]
