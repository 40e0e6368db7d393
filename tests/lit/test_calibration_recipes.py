"""Calibration by recipe: its options, the cache, the packed student, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from calibrations import RANGES, module_of
from safetensors.torch import load_file, save_file

from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights import weight_methods
from modiff.errors import CalibrationError
from modiff.lit.callbacks import calibration as callback_module
from modiff.lit.callbacks.calibration import calibration_parts
from modiff.lit.cli.main import main
from modiff.lit.cli.student import StudentCLI
from modiff.lit.commands import quantize as quantize_module
from modiff.lit.modules.calibration_config import CalibrationConfig
from modiff.lit.runs.cache import calibration_key

FAST = ("--timing_rounds", "0", "--error_images", "0")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The methods of the calibrations that really ran."""
    found: list[str] = []
    real = callback_module.calibrate

    def counted(teacher, config, run, method, *args, **kwargs):
        found.append(method)
        return real(teacher, config, run, method, *args, **kwargs)

    monkeypatch.setattr(callback_module, "calibrate", counted)
    return found


def built(recipe: Path, *options: str) -> StudentCLI:
    return StudentCLI("evaluate", ["--config", str(recipe), *options])


def samples(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(str(folder / "samples.safetensors"))


# --- options ----------------------------------------------------------------------------------------------------------


def test_methods_of_the_recipe_are_those_of_the_library() -> None:
    assert [CalibrationConfig(method=name).method for name in weight_methods()] == list(weight_methods())


def test_settings_are_the_librarys_fields_and_defaults() -> None:
    assert CalibrationConfig().settings == CalibrationSettings()
    assert CalibrationConfig(iterations=7, beta=[8, 2]).settings == CalibrationSettings(iterations=7, beta=(8.0, 2.0))


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--model.calibration.method", "brecq"], "method", "brecq"),
        (["--model.calibration.method=brecq"], "method", "brecq"),
        (["--model.calibration.evaluations", "null"], "evaluations", None),
        (["--model.calibration.evaluations=None"], "evaluations", None),
        (["--model.calibration.damping", "1e-1"], "damping", 0.1),
        (["--model.calibration.beta", "[10, 2]"], "beta", (10.0, 2.0)),
        (["--model.calibration.seed", "5"], "seed", 5),
        (["--model.calibration", "{method: lp}"], "method", "lp"),
        ([], "num_images", 6),
    ],
)
def test_one_field_is_overridden_null_included(calibrated, options, field, value) -> None:
    found = getattr(built(calibrated, *options).model.calibration, field)
    assert found == value
    assert type(found) is type(value)


def test_no_calibration_is_null(recipe, calibrated) -> None:
    assert built(recipe).model.calibration is None
    assert built(calibrated, "--model.calibration", "null").model.calibration is None
    assert built(recipe, "--model.calibration.method", "lp").model.calibration == CalibrationConfig(method="lp")


def test_printed_recipe_is_the_same_recipe(calibrated, tmp_path, capsys) -> None:
    options = ["--model.calibration.evaluations", "null", "--model.calibration.method", "brecq"]
    with pytest.raises(SystemExit):
        main(["evaluate", "--config", str(calibrated), *options, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    values = yaml.safe_load(printed.read_text())["model"]["calibration"]
    assert set(values) == {field.name for field in dataclasses.fields(CalibrationConfig)}
    assert values["evaluations"] is None
    cli, again = built(calibrated, *options), built(printed)
    assert again.model.calibration == cli.model.calibration
    assert again.identity() == cli.identity()
    assert again.dump() == cli.dump()
    saved = tmp_path / "saved.yaml"
    saved.write_text(cli.dump())
    assert built(saved).model.calibration == cli.model.calibration
    assert built(calibrated).identity() != cli.identity()


def test_help_lists_every_field(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--model.calibration.help"])
    out = capsys.readouterr().out
    assert all(f"--model.calibration.{field.name}" in out for field in dataclasses.fields(CalibrationConfig))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.calibration.metod", "gptq"], "model.calibration: there is no field 'metod'; allowed are"),
        (["--model.calibration.method", "best"], "model.calibration: method is 'best'; allowed are adaround, brecq"),
        (["--model.calibration.num_images", "0"], "model.calibration: num_images is 0; allowed are whole numbers of"),
        (["--model.calibration.images_per_batch", "0.5"], "model.calibration: images_per_batch is 0.5"),
        (["--model.calibration.seed", "-1"], "model.calibration: seed is -1"),
        (["--model.calibration.damping", "2"], "model.calibration: damping is 2; allowed is 0 to 1"),
        (["--model.calibration.method.name", "x"], "model.calibration has no field 'name' to override"),
        (["--model.calibration", "true"], "model.calibration: True is no calibration; give null, or a mapping"),
        (["--model.calibration.seed"], "--model.calibration.seed is given without a value"),
        (
            ["--model.calibration", "null", "--model.config.activation", RANGES],
            "The recipe has range: calibrated, but no calibration. Add one, such as --model.calibration.method nearest",
        ),
        (["--model.preset", "w32a4-modiff-paper"], "'gptq', which finds weights, but the recipe quantizes none"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "quantize"])
def test_wrong_option_is_one_plain_sentence_and_writes_nothing(
    modiff, calibrated, tmp_path, command, options, message
) -> None:
    status, _, err = modiff(command, "--config", calibrated, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the cache, the packed student ------------------------------------------------------------------------------------


def test_calibrates_once_then_reads_and_packs_the_same_student(calibrated, modiff, calls, tmp_path, cache) -> None:
    first, second, packed = tmp_path / "first", tmp_path / "second", tmp_path / "packed"
    status, said, err = modiff("evaluate", "--config", calibrated, *FAST, "--output", first)
    assert status == 0, err
    assert calls == ["gptq"]
    (kept,) = (cache / "calibrations").iterdir()
    assert f"Calibrating by gptq on 6 images, once; kept in {kept}." in said
    assert sorted(path.name for path in kept.iterdir()) == [".holder.json", ".lock", "student"]

    status, said, err = modiff("evaluate", "--config", calibrated, *FAST, "--output", second)
    assert status == 0, err
    assert calls == ["gptq"]
    assert f"Calibration read from {kept / 'student'}." in said
    assert (second / "samples.safetensors").read_bytes() == (first / "samples.safetensors").read_bytes()

    status, said, err = modiff("quantize", "--config", calibrated, "--output", packed)
    assert status == 0, err
    assert calls == ["gptq"]
    assert f"modiff evaluate --ckpt {packed}" in said

    shutil.rmtree(cache)
    third = tmp_path / "third"
    status, said, err = modiff("evaluate", "--config", calibrated, *FAST, "--ckpt", packed, "--output", third)
    assert status == 0, err
    assert calls == ["gptq"]
    assert not cache.exists()
    assert (third / "samples.safetensors").read_bytes() == (first / "samples.safetensors").read_bytes()

    nearest = tmp_path / "nearest"
    assert modiff("evaluate", "--config", calibrated, *FAST, "--model.calibration=null", "--output", nearest)[0] == 0
    assert not torch.equal(samples(nearest)["student"], samples(first)["student"])
    assert torch.equal(samples(nearest)["teacher"], samples(first)["teacher"])


def test_sample_and_compare_calibrate_too(calibrated, modiff, calls, tmp_path) -> None:
    assert modiff("sample", "--config", calibrated, "--output", tmp_path / "sample")[0] == 0
    plain = tmp_path / "plain.yaml"
    plain.write_text(calibrated.read_text().replace("method: gptq", "method: nearest"))
    options = ("--output", tmp_path / "compare", "--wandb", "disabled")
    status, _, err = modiff("compare", calibrated, plain, *options)
    assert status == 0, err
    assert calls == ["gptq", "nearest"]
    drawn = samples(tmp_path / "sample")["student"]
    assert torch.equal(drawn, samples(tmp_path / "compare" / "calibrated")["student"])
    assert not torch.equal(drawn, samples(tmp_path / "compare" / "plain")["student"])


def test_content_hash_is_of_all_that_the_result_depends_on(tiny_teacher, tmp_path) -> None:
    def key(module):
        return calibration_key(calibration_parts(module))

    base = key(module_of(tiny_teacher))
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    assert key(module_of(other)) == base  # content, not place
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(str(weights))
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, str(weights), {"format": "pt"})
    changed = [
        module_of(other),
        module_of(tiny_teacher, "w4a4-modiff-paper"),
        module_of(tiny_teacher, "w3a4-ptq-paper"),
    ]
    changed += [module_of(tiny_teacher, **{name: 1}) for name in ("seed", "num_images", "stage_size", "evaluations")]
    steps = module_of(tiny_teacher)
    steps.steps = 4
    conditions = module_of(tiny_teacher)
    conditions.conditions = lambda indices: [i % 2 for i in indices]
    keys = [key(module) for module in (*changed, steps, conditions)]
    assert len({base, *keys}) == len(keys) + 1


def test_content_hash_is_of_the_algorithm_and_of_pytorch_too(tiny_teacher, monkeypatch) -> None:
    parts = calibration_parts(module_of(tiny_teacher))
    keys = [calibration_key(parts)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.11.0")
        keys.append(calibration_key(parts))
    monkeypatch.setattr("modiff.lit.runs.cache.ALGORITHM_VERSION", 0)
    keys.append(calibration_key(parts))
    assert len(set(keys)) == 3


def test_noise_is_not_that_of_the_images_of_the_same_seed(tiny_teacher, monkeypatch) -> None:
    module = module_of(tiny_teacher)
    module.seed = module.calibration.seed
    drawn: list[torch.Tensor] = []
    real = callback_module.indexed_noise
    monkeypatch.setattr(callback_module, "indexed_noise", lambda *args: (drawn.append(real(*args)), drawn[-1])[1])
    module._trainer = SimpleNamespace(callbacks=[], precision_plugin=SimpleNamespace(forward_context=nullcontext))
    module.eta = 1.0  # every step draws noise
    callback_module.draw(module, module.calibration, module.student)
    steps = len(drawn) // 2  # x_T and the noise of the steps, for a batch of 4 and one of 2
    assert [len(noise) for noise in drawn] == [4] * steps + [2] * steps
    assert steps >= module.steps
    evaluation = torch.cat([module.noise(torch.arange(6), stream) for stream in range(steps)]).flatten(1)
    found = torch.cat(drawn).flatten(1)
    assert len(torch.unique(torch.cat([evaluation, found]), dim=0)) == len(evaluation) + len(found)


def test_student_without_its_calibration_draws_nothing(tiny_teacher) -> None:
    module = module_of(tiny_teacher)
    with pytest.raises(CalibrationError, match="asks for a calibration, and the student has none yet"):
        module.draw("student", torch.arange(2))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_checkpoint_of_another_teacher_calibration_or_quantization(calibrated, modiff, tiny_teacher, tmp_path) -> None:
    packed = tmp_path / "packed"
    assert modiff("quantize", "--config", calibrated, "--output", packed)[0] == 0
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(str(weights))
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, str(weights), {"format": "pt"})
    args = ("evaluate", "--config", calibrated, "--ckpt", packed, "--output", tmp_path / "out")
    for options, message in (
        (("--model.teacher.path", other), r"packed was made of another teacher \(weights [0-9a-f]{12}\.\.\., those of"),
        (("--model.calibration.seed", "3"), r"by another calibration than the recipe's \(seed is 0\)"),
        (("--model.config.weight.bits", "4"), "holds a quantization of its own, but the recipe gives another"),
    ):
        status, _, err = modiff(*args, *options)
        assert status == 1
        assert re.search(message, err)
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    plain = tmp_path / "plain"
    assert modiff("quantize", "--config", calibrated, "--model.calibration", "null", "--output", plain)[0] == 0
    status, _, err = modiff("evaluate", "--config", calibrated, "--ckpt", plain, "--output", tmp_path / "out")
    assert status == 1
    assert "was made without calibration. Make it with this recipe by modiff quantize" in err


def test_more_buckets_than_steps(calibrated, modiff, tmp_path) -> None:
    options = ("--model.config.activation", RANGES.replace("}", ", timestep_buckets: 9}"))
    status, _, err = modiff("quantize", "--config", calibrated, *options, "--output", tmp_path / "out")
    assert status == 1
    assert "timestep_buckets is 9, but a trajectory has 4 evaluations only. Use at most 4." in err
    assert not (tmp_path / "out").exists()


def test_output_that_holds_something_is_refused_before_the_calibration(calibrated, modiff, calls, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    status, _, err = modiff("quantize", "--config", calibrated, "--output", tmp_path / "out")
    assert status == 1
    assert "holds files that are not a checkpoint of modiff" in err
    status, _, err = modiff("quantize", "--config", calibrated, "--ckpt", "x", "--output", tmp_path / "new")
    assert status == 1
    assert calls == []


def test_nothing_is_drawn_by_quantize() -> None:
    assert list(quantize_module.Nothing()) == []
