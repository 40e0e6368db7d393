"""Operators on one vector per sample, and those at the denoiser's ends, get quantizers of their own."""

import json

import pytest
import torch
from small_models import Denoiser, denoiser
from torch import nn

import modiff
from modiff.config import QuantConfig, QuantSpec, Rule, Special
from modiff.errors import ConfigError
from modiff.student.special import resolve
from modiff.teachers.zoo import ZOO, TeacherSpec, load_teacher

EIGHT = QuantSpec(8, "sample")
FOUR = QuantConfig(
    weight=QuantSpec(4, "channel"),
    activation=QuantSpec(4, "sample"),
    vectors=Special(weight=QuantSpec(8, "channel"), activation=EIGHT),
    ends=Special(weight=QuantSpec(8, "channel")),
)
FAMILIES = {entry.family: name for name, entry in reversed(ZOO.items())}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_of_diffusers_networks_says_what_an_evaluation_shows(family):
    teacher = load_teacher(TeacherSpec(FAMILIES[family], tiny=True))
    noise = torch.randn(2, *teacher.sample_shape)
    args, kwargs = teacher.inputs(noise, torch.tensor(500), teacher.conditioning([0, 1], None, 1.0), 1.0)
    example = kwargs or args
    known, seen = resolve(teacher.denoiser, FOUR), resolve(teacher.denoiser, FOUR, example)
    assert set(known.vectors.names) == set(seen.vectors.names)
    assert set(known.ends.names) == set(seen.ends.names)
    assert len(seen.ends.names) == 2
    assert len(seen.vectors.names) >= 3


def test_each_kind_gets_its_own_specs_and_a_rule_wins():
    config = QuantConfig(
        FOUR.weight, FOUR.activation, vectors=FOUR.vectors, ends=FOUR.ends, rules=[Rule("conv_out", weight=FOUR.weight)]
    )
    student = modiff.quantize(denoiser(), config, example_inputs=(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4)))
    rows = {row.name: (row.special, row.weight.bits, row.activation.bits) for row in modiff.describe(student)}
    assert rows == {"conv_in": ("end", 8, 4), "time": ("vector", 8, 8), "conv_out": ("end", 4, 4)}
    assert "vector" in str(modiff.describe(student))


def test_names_may_be_given():
    config = QuantConfig(weight=FOUR.weight, ends=Special(weight=None, names=["conv_in"]))
    student = modiff.quantize(denoiser(), config)
    assert [row.weight is None for row in modiff.describe(student)] == [True, False, False]


def test_names_that_were_found_are_saved_and_loaded(tmp_path):
    student = modiff.quantize(denoiser(), FOUR, example_inputs=(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4)))
    modiff.save(student, tmp_path / "s")
    saved = json.loads((tmp_path / "s" / "config.json").read_text())["quant_config"]
    assert saved["vectors"]["names"] == ["time"]
    loaded = modiff.load(tmp_path / "s", denoiser(1))
    assert [(r.name, r.special, r.weight) for r in modiff.describe(loaded)] == [
        (r.name, r.special, r.weight) for r in modiff.describe(student)
    ]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"names": ["conv9"]}, "vectors.names has 'conv9', which is no operator. Names here are like: conv_in"),
        ({"names": 3}, "names is 3; give a list of qualified names"),
        ({"activation": 8}, "activation is 8; allowed are a QuantSpec, 'inherit' or None"),
        ({"weight": QuantSpec(8, "sample")}, "weight granularity is 'sample'"),
    ],
)
def test_wrong_parts_are_refused(part, message):
    with pytest.raises(ConfigError, match=message):
        modiff.quantize(denoiser(), QuantConfig(weight=FOUR.weight, vectors=Special(**part)))


def test_a_part_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="ends is 8; allowed are a Special or None"):
        QuantConfig(ends=8)


def test_an_example_that_does_not_fit_is_refused():
    model = denoiser()
    with pytest.raises(ConfigError, match=r"cannot be called with example_inputs \(.*\). Give the arguments"):
        modiff.quantize(model, FOUR, example_inputs=(torch.zeros(1, 3, 8, 8),))
    assert type(model) is Denoiser
    assert type(model.conv_in) is nn.Conv2d
    assert not model.conv_in._forward_pre_hooks
