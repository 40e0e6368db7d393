"""Values that no recipe can mean are refused before any work, each by one plain sentence."""

from __future__ import annotations

import json
import math

import pytest
import torch

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.errors import ConfigError
from modiff.lit.cli.documents import read_document

LONG = "9" * 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample_count", "0"], "sample_count is 0; allowed are whole numbers, 1 to 1000000"),
        (["--sample_count", "-1"], "sample_count is -1; allowed are whole numbers, 1 to"),
        (["--sample_count", "null"], "sample_count is 'None'; allowed are whole numbers"),
        (["--error_images", "-1"], "error_images is -1; allowed are whole numbers, 0 to"),
        (["--timing_rounds", "-1"], "timing_rounds is -1; allowed are whole numbers, 0 to"),
        (["--seed", "null"], "seed is 'None'; allowed are whole numbers"),
        (["--num_images", str(10**24)], "num_images is 1000000000000000000000000; allowed are whole numbers, 1 to"),
        (["--data.batch_size", str(10**12)], "data.batch_size is 1000000000000; allowed are whole numbers, 1 to"),
        (["--model", "3"], "model is '3', which is no mapping"),
        (["--trainer.precision", "transformer-engine"], "Lightning refuses the trainer's arguments"),
        (["--ckpt", "FILE"], "FILE does not exist. Give a directory that modiff.save wrote"),
        (["--seed", LONG], "--seed holds a number of more than 300 digits"),
        (["--model.steps", LONG], "--model.steps holds a number of more than 300 digits"),
        (["--model.config.activation.bits", LONG], "holds a number of more than 300 digits"),
        (["--model.config.rules", "[" * 3000], "--model.config.rules is nested deeper than 50 levels"),
        (["--model.config", "{a: " * 3000], "--model.config is nested deeper than 50 levels"),
        (["--model.config.rules", "&a [*a]"], "--model.config.rules refers to itself by an alias"),
        (["--model.config.modulation.warmup_rounds", "1000000"], "warmup_rounds is 1000000; allowed are whole numbers"),
        (
            ["--model.config.splits", "[{name: conv_in, at: 1}, {name: conv_in, at: 1}]"],
            "splits names operator 'conv_in' twice",
        ),
        (["--config", "EMPTY"], "is empty. Give a file with fields"),
        (["--config", "SELF"], "refers to itself by an alias"),
        (["--config", "DEEP"], "is nested deeper than 50 levels"),
        (["--config", "INDENTED"], "is nested deeper than 50 levels"),
        (["--config", "NUMBER"], "holds a number of more than 300 digits"),
        (["--config", "BOMB"], "holds more than 100000 values once its aliases are expanded"),
        (["--config", "BINARY"], "is not YAML"),
    ],
)
@pytest.mark.timeout(120)
def test_impossible_values(modiff, recipe, tmp_path, options, message) -> None:
    files = {
        "FILE": b"abc",
        "EMPTY": b"",
        "SELF": b"model: &a {config: *a}\n",
        "DEEP": ("model: " + "{a: " * 2000 + "}" * 2000).encode(),
        "INDENTED": "\n".join(" " * i + "a:" for i in range(400)).encode(),
        "NUMBER": f"seed: {LONG}".encode(),
        "BOMB": b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(6)),
        "BINARY": bytes(range(128, 256)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    options = [str(tmp_path / option) if option in files else option for option in options]
    given = [] if options[0] == "--config" else ["--config", recipe]
    status, _, err = modiff("evaluate", *given, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists() or "precision" in options[0]  # the Trainer is made in the directory


def test_documents_as_they_are_meant() -> None:
    assert read_document("{a: [1, {b: null}]}", "x") == {"a": [1, {"b": None}]}
    assert read_document("a: &x {b: 1}\nc: *x", "x") == {"a": {"b": 1}, "c": {"b": 1}}
    with pytest.raises(ConfigError, match="x is not YAML"):
        read_document("a: [", "x")


@pytest.mark.parametrize("side", ["activation", "weight"])
def test_a_group_larger_than_the_channels_is_all_of_them(side) -> None:
    """A thousand million channels would be 4 GiB of filling for eight."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    outputs = []
    for size in (8, 10**9):
        specs = {"weight": QuantSpec(4, "channel"), "activation": QuantSpec(4, "sample")}
        specs[side] = QuantSpec(4, "group", group_size=size)
        torch.manual_seed(0)
        model = modiff.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), QuantConfig(**specs))
        outputs.append(model(torch.linspace(-1, 1, 16).reshape(2, 8)))
    assert torch.equal(outputs[0], outputs[1])


def test_numbers_that_cannot_be_printed() -> None:
    with pytest.raises(
        ConfigError, match="bits is a number of more than 300 digits; allowed are whole numbers, 2 to 8"
    ):
        QuantSpec(10**6000)
    with pytest.raises(ConfigError, match=r"warmup_rounds is 101; allowed are whole numbers, 1 to 100\."):
        Modulation(warmup="refine", warmup_rounds=101)
    nested: list = []
    nested.append(nested)
    with pytest.raises(ConfigError, match=r"rules is \(\[\[\.\.\.\]\],\); give a list of Rule"):
        QuantConfig(rules=nested)


@pytest.mark.parametrize("contexts", [5, None.__class__, ("a", 3), ("a", ["b"]), "ab", ()])
def test_contexts_that_are_no_names(contexts) -> None:
    student = modiff.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), "w8a8-modiff")
    with pytest.raises(ConfigError, match="contexts is .*; give the names of a step's denoiser calls"):
        modiff.trajectory(student, contexts=contexts).__enter__()


@pytest.mark.parametrize("precision", ["64", "bf16-true", "bf16-mixed", "16-true"])
def test_every_precision_of_the_trainer_draws(modiff, recipe, tmp_path, precision) -> None:
    options = ["--num_images", "2", "--model.steps", "2", "--trainer.precision", precision]
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["evaluations"]["total"], metrics["evaluations"]["quantized"]) == (2, 1)
    assert math.isfinite(metrics["student"]["relative_l2"])
