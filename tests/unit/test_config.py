import dataclasses
import re

import pytest

from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import ConfigError, ModiffError


def exactly(text):
    return "^" + re.escape(text) + "$"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits is 1; allowed are whole numbers, 2 to 8; for full precision set the whole spec to null."),
        ({"bits": 9}, "bits is 9; allowed are whole numbers, 2 to 8; for full precision set the whole spec to null."),
        ({"bits": 32}, "bits is 32; allowed are whole numbers, 2 to 8; for full precision set the whole spec to null."),
        (
            {"bits": 4.0},
            "bits is 4.0; allowed are whole numbers, 2 to 8; for full precision set the whole spec to null.",
        ),
        (
            {"bits": True},
            "bits is True; allowed are whole numbers, 2 to 8; for full precision set the whole spec to null.",
        ),
        (
            {"granularity": "row"},
            "granularity is 'row'; allowed are tensor, sample, channel, sample_channel, token, group.",
        ),
        ({"symmetric": 1}, "symmetric is 1; allowed are true and false."),
        ({"range": "static"}, "range is 'static'; allowed are dynamic, previous, calibrated."),
        (
            {"range": "calibrated", "granularity": "sample"},
            "range is 'calibrated' with granularity 'sample', whose scales belong to rows of a batch; allowed are "
            "tensor, channel, group. Set granularity='tensor', or range='dynamic'.",
        ),
        ({"timestep_buckets": 0}, "timestep_buckets is 0; allowed are whole numbers, 1 or more."),
        (
            {"timestep_buckets": 10},
            "timestep_buckets is 10, but range is 'dynamic', which is new in every evaluation. Set range='calibrated', "
            "or remove timestep_buckets.",
        ),
        ({"clip": 0}, "clip is 0; allowed is 0 < clip <= 1. Use 1.0 for the full range."),
        ({"clip": 1.5}, "clip is 1.5; allowed is 0 < clip <= 1. Use 1.0 for the full range."),
        ({"clip": float("nan")}, "clip is nan; allowed is 0 < clip <= 1. Use 1.0 for the full range."),
        ({"clip": "wide"}, "clip is 'wide'; allowed is 0 < clip <= 1. Use 1.0 for the full range."),
        ({"clip": True}, "clip is True; allowed is 0 < clip <= 1. Use 1.0 for the full range."),
        (
            {"granularity": "group"},
            "granularity 'group' needs group_size. Set it, for example group_size=32.",
        ),
        ({"granularity": "group", "group_size": 0}, "group_size is 0; allowed are whole numbers, 1 or more."),
        (
            {"granularity": "sample", "group_size": 8},
            "group_size is 8 but granularity is 'sample'. Set granularity='group', or remove group_size.",
        ),
    ],
)
def test_quant_spec_refuses(fields, message):
    with pytest.raises(ConfigError, match=exactly(message)):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"error_compensation": "yes"}, "error_compensation is 'yes'; allowed are true and false."),
        ({"warmup": "none"}, "warmup is 'none'; allowed are full, refine."),
        ({"warmup_rounds": 0}, "warmup_rounds is 0; allowed are whole numbers, 1 to 100."),
        ({"refresh_every": 1}, "refresh_every is 1; allowed are whole numbers, 2 or more."),
        ({"refresh_every": 2.5}, "refresh_every is 2.5; allowed are whole numbers, 2 or more."),
        ({"state_dtype": "int8"}, "state_dtype is 'int8'; allowed are float32, float16, bfloat16."),
        (
            {"state_dtype": "bfloat16"},
            "state_dtype 'bfloat16' lets ô drift away from A(â). Set refresh_every, or use 'float16' or 'float32'.",
        ),
        (
            {"warmup": "refine", "error_compensation": False},
            "warmup 'refine' needs error_compensation. Use warmup='full'.",
        ),
    ],
)
def test_modulation_refuses(fields, message):
    with pytest.raises(ConfigError, match=exactly(message)):
        Modulation(**fields)


def test_bfloat16_state_is_allowed_with_counted_refreshes():
    assert Modulation(state_dtype="bfloat16", refresh_every=5).state_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ""}, "pattern is ''; give a glob on module names, such as 'conv_in' or '*.to_q'."),
        ({"pattern": 3}, "pattern is 3; give a glob on module names, such as 'conv_in' or '*.to_q'."),
        ({"pattern": "a", "weight": 4}, "weight is 4; allowed are a QuantSpec, 'inherit' or None."),
        ({"pattern": "a", "activation": "none"}, "activation is 'none'; allowed are a QuantSpec, 'inherit' or None."),
        ({"pattern": "a", "modulation": True}, "modulation is True; allowed are a Modulation, 'inherit' or None."),
        ({"pattern": "a", "skip": "no"}, "skip is 'no'; allowed are true and false."),
        ({"pattern": "a", "type": "norm"}, "type is 'norm'; allowed are any, linear, conv."),
        (
            {"pattern": "a", "weight": QuantSpec(granularity="sample")},
            "weight granularity is 'sample'; allowed are tensor, channel, group.",
        ),
    ],
)
def test_rule_refuses(fields, message):
    with pytest.raises(ConfigError, match=exactly(message)):
        Rule(**fields)


def test_rule_refuses_a_broken_regular_expression():
    with pytest.raises(ConfigError, match=r"^pattern 're:\(' is not a regular expression: .*\.$"):
        Rule("re:(")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 8}, "weight is 8; allowed are a QuantSpec or None."),
        ({"activation": "inherit"}, "activation is 'inherit'; allowed are a QuantSpec or None."),
        ({"modulation": QuantSpec()}, "modulation is QuantSpec("),
        ({"rules": "*"}, "rules is '*'; give a list of Rule."),
        ({"rules": ["*"]}, "rules is ('*',); give a list of Rule."),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed are auto, simulate, onednn, cpp, triton."),
        (
            {"weight": QuantSpec(granularity="token")},
            "weight granularity is 'token'; allowed are tensor, channel, group.",
        ),
    ],
)
def test_quant_config_refuses(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        QuantConfig(**fields)


def test_config_errors_are_value_errors_too():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, ModiffError)


@pytest.mark.parametrize("name", ["w8a4", "w8a9-modiff", "w1a4-ptq", "w8a4-modif", "W8A4-modiff", "w16a16-ptq", "", 3])
def test_unknown_preset(name):
    with pytest.raises(
        ConfigError, match=r"^unknown preset .*; allowed are w\{bits\}a\{bits\}-modiff and .*'w8a4-modiff'\.$"
    ):
        QuantConfig.preset(name)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_paper_presets_follow_the_definition(bits):
    modiff, ptq = (QuantConfig.preset(f"w{bits}a{bits}-{arm}-paper") for arm in ("modiff", "ptq"))
    assert modiff.weight == ptq.weight == QuantSpec(bits, "channel", symmetric=True)
    assert ptq.activation == QuantSpec(bits, "sample", symmetric=False)
    assert modiff.activation == QuantSpec(bits, "sample", symmetric=bits >= 6)
    assert modiff.modulation == Modulation()
    assert ptq.modulation is None
    assert (modiff.vectors, modiff.ends, ptq.vectors, ptq.ends) == (None, None, None, None)


@pytest.mark.parametrize("activation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("weight", [4, 8])
def test_best_presets_follow_the_definition(weight, activation):
    modiff, ptq = (QuantConfig.preset(f"w{weight}a{activation}-{arm}") for arm in ("modiff", "ptq"))
    assert modiff.weight == ptq.weight == QuantSpec(weight, "channel", symmetric=weight == 8)
    if activation >= 6:
        assert ptq.activation == QuantSpec(activation, "sample", symmetric=False)
        assert modiff.activation == QuantSpec(activation, "sample", symmetric=activation > 6)
    else:
        spec = QuantSpec(activation, "sample_channel", symmetric=False, scales="power_of_two")
        assert ptq.activation == spec
        assert modiff.activation == (dataclasses.replace(spec, clip=0.8) if activation == 2 else spec)
    assert (modiff.modulation, ptq.modulation) == (Modulation(), None)
    for config in (modiff, ptq):
        assert config.vectors == config.ends
        if weight == activation == 8:
            assert config.vectors is None
            continue
        wide = QuantSpec(8, "sample", symmetric=config is modiff)
        assert config.vectors.weight == ("inherit" if weight == 8 else QuantSpec(8, "channel"))
        assert config.vectors.activation == ("inherit" if activation == 8 else wide)


def test_presets_survive_dictionaries():
    for name in ("w4a2-modiff", "w8a4-ptq", "w4a8-modiff-paper"):
        config = QuantConfig.preset(name)
        assert QuantConfig.from_dict(dataclasses.asdict(config)) == config


def test_errors_of_special_parts_say_where():
    with pytest.raises(ConfigError, match="vectors: activation: bits is 9; allowed are whole numbers, 2 to 8"):
        QuantConfig.from_dict({"vectors": {"activation": {"bits": 9}}})
    with pytest.raises(
        ConfigError, match="ends: Special has no field 'modulation'; allowed are weight, activation, names"
    ):
        QuantConfig.from_dict({"ends": {"modulation": None}})


def test_preset_32_leaves_a_side_untouched():
    assert QuantConfig.preset("w32a4-modiff").weight is None
    assert QuantConfig.preset("w8a32-modiff").activation is None


def test_rule_patterns():
    assert Rule("down_blocks.*.conv1").names("down_blocks.0.resnets.1.conv1")
    assert not Rule("conv1").names("down_blocks.0.conv1")
    assert Rule("re:conv_(in|out)").names("conv_out")
    assert not Rule("re:conv_(in|out)").names("conv_outer")
    assert not Rule("*", type="linear").matches("conv_in", "conv")
    assert Rule("*", type="conv").matches("conv_in", "conv")


def test_code_ranges():
    for bits in range(2, 9):
        n = 2 ** (bits - 1) - 1
        assert QuantSpec(bits).code_range == (-n, n)
        assert QuantSpec(bits, symmetric=False).code_range == (0, 2**bits - 1)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3


def test_from_dict_is_the_inverse_of_asdict():
    config = QuantConfig(
        QuantSpec(4, "group", group_size=8),
        None,
        Modulation(refresh_every=10),
        [Rule("a", weight=None, activation=QuantSpec(3)), Rule("b", skip=True, type="linear")],
    )
    assert QuantConfig.from_dict(dataclasses.asdict(config)) == config
    assert QuantConfig.from_dict({"rules": None}) == QuantConfig()
    assert QuantConfig.from_dict({}) == QuantConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weigth": None},
            "QuantConfig has no field 'weigth'; allowed are weight, activation, modulation, rules, splits, smoothed, "
            "vectors, ends, backend, schedule.",
        ),
        (
            {"activation": {"bit": 4}},
            "activation: QuantSpec has no field 'bit'; allowed are bits, granularity, symmetric, range, clip, "
            "group_size, timestep_buckets, scales.",
        ),
        ({"modulation": {"warmup": "x"}}, "modulation: warmup is 'x'; allowed are full, refine."),
        ({"rules": [{"pattern": "a"}, {"skip": True}]}, "rules[1]: Rule needs the field 'pattern'. Set it."),
        (
            {"rules": [{"pattern": "a", "weight": {"clip": 2}}]},
            "rules[0]: weight: clip is 2; allowed is 0 < clip <= 1. Use 1.0 for the full range.",
        ),
        ({"rules": {"pattern": "a"}}, "rules is {'pattern': 'a'}; give a list of Rule."),
        ({"rules": ["a"]}, "rules is ('a',); give a list of Rule."),
        ([], "QuantConfig is []; give a mapping with its fields."),
    ],
)
def test_from_dict_says_where_the_error_is(values, message):
    with pytest.raises(ConfigError, match=exactly(message)):
        QuantConfig.from_dict(values)
