"""Calibration by recipe: its options, the cache, the packed student, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

import pytest
import rich.progress
import torch
import yaml
from safetensors.torch import load_file, save_file

from modiff.calibration.settings import METHODS, CalibrationSettings
from modiff.errors import CalibrationError
from modiff.lit import quantize as quantize_module
from modiff.lit.calibration import CalibrationConfig, calibration_key, locked
from modiff.lit.callbacks import calibration as callback_module
from modiff.lit.callbacks.calibration import Calibration, calibration_parts
from modiff.lit.callbacks.progress import EvaluationProgressBar, LineProgress
from modiff.lit.cli import main
from modiff.lit.student import LitStudent
from modiff.lit.student_cli import StudentCLI
from modiff.teachers.zoo import TeacherSpec

CALIBRATION = """
  calibration:
    method: gptq
    num_images: 6
    images_per_batch: 4
    evaluations: 2
    positions: 200
    samples: 8
    iterations: 4
    tuning_iterations: 3
"""
RANGES = "{bits: 4, granularity: tensor, range: calibrated}"
FAST = ("--timing_rounds", "0", "--error_images", "0")


@pytest.fixture
def calibrated(tmp_path, recipe_text) -> Path:
    """A recipe that asks for GPTQ weights of 3 bits."""
    path = tmp_path / "calibrated.yaml"
    text = recipe_text.replace("w8a4", "w3a4")
    path.write_text(text.replace("\n  scheduler:", CALIBRATION.rstrip() + "\n  scheduler:"))
    return path


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
    assert typing.get_args(typing.get_type_hints(CalibrationConfig)["method"]) == METHODS


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
        (["--model.calibration.method", "best"], "model.calibration: method is 'best'; allowed are nearest, lp"),
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
        (["--model.config.weight", "null"], "'gptq', which finds weights, but the recipe quantizes none"),
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
    assert sorted(path.name for path in kept.iterdir()) == ["lock", "student"]

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


def module_of(teacher: Path, preset="w3a4-modiff", **options) -> LitStudent:
    calibration = CalibrationConfig(**{"num_images": 6, "images_per_batch": 4, "positions": 200} | options)
    module = LitStudent(TeacherSpec(path=str(teacher)), preset=preset, steps=3, calibration=calibration)
    module.configure_model()
    return module


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
    changed = [module_of(other), module_of(tiny_teacher, "w4a4-modiff"), module_of(tiny_teacher, "w3a4-ptq")]
    changed += [module_of(tiny_teacher, **{name: 1}) for name in ("seed", "num_images", "stage_size", "evaluations")]
    steps = module_of(tiny_teacher)
    steps.steps = 4
    conditions = module_of(tiny_teacher)
    conditions.conditions = lambda indices: [i % 2 for i in indices]
    keys = [key(module) for module in (*changed, steps, conditions)]
    assert len({base, *keys}) == len(keys) + 1


def test_content_hash_is_of_the_code_too(tiny_teacher, monkeypatch) -> None:
    parts = calibration_parts(module_of(tiny_teacher))
    before = calibration_key(parts)
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: real(self) + (b"#" if self.name == "gptq.py" else b""))
    assert calibration_key(parts) != before


def test_noise_is_not_that_of_the_images_of_the_same_seed(tiny_teacher, monkeypatch) -> None:
    module = module_of(tiny_teacher)
    module.seed = module.calibration.seed
    drawn: list[torch.Tensor] = []
    real = callback_module.indexed_noise
    monkeypatch.setattr(callback_module, "indexed_noise", lambda *args: (drawn.append(real(*args)), drawn[-1])[1])
    module._trainer = type("Trainer", (), {"callbacks": []})()
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


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_says_how_far_and_how_long(capsys, monkeypatch) -> None:
    lines = LineProgress(every_s=0)
    lines.on_calibration_progress(2, 5, "mid_block.resnets.0", 75.0)
    lines.on_calibration_progress(5, 5, "conv_out", 0.0)
    out = capsys.readouterr().out
    assert "calibration: 2 of 5 done (mid_block.resnets.0), about 1 min 15 s left" in out
    assert "calibration: 5 of 5 done (conv_out)\n" in out
    bar = EvaluationProgressBar()
    bar.on_calibration_progress(1, 5, "conv_in", None)  # no terminal yet
    bar.progress = rich.progress.Progress()
    bar.on_calibration_progress(1, 5, "conv_in", 8.0)
    bar.on_calibration_progress(2, 5, "conv_out", 6.0)
    (task,) = bar.progress.tasks
    assert (task.completed, task.total) == (2, 5)
    assert task.description == "calibration, about 6 s left"


def test_of_many_operators_the_first_is_named() -> None:
    told: list[str] = []
    watcher = type("Watcher", (), {"on_calibration_progress": lambda _, done, total, what, left: told.append(what)})
    trainer = type("Trainer", (), {"callbacks": [watcher(), object()]})
    for what in ("ranges, pass 1", "conv_in, mid.conv1, mid.conv2", "conv_out"):
        callback_module.tell(trainer, 1, 2, what, None)
    assert told == ["ranges, pass 1", "conv_in and 2 more", "conv_out"]


def test_time_left_is_of_the_stages_done_here(monkeypatch) -> None:
    callback = Calibration()
    callback._start, callback._done_before = 100.0, 2
    monkeypatch.setattr(callback_module.time, "monotonic", lambda: 130.0)
    assert callback._seconds_left(2, 8) is None
    assert callback._seconds_left(5, 8) == 30.0


# --- stops and restarts -----------------------------------------------------------------------------------------------


def stages(cache: Path) -> int:
    return len(list(cache.glob("calibrations/*/stages/stage-*/config.json")))


@pytest.mark.slow
def test_two_ranks_pack_the_student_of_one(calibrated, tmp_path) -> None:
    """BRECQ's samples and the extremes of ranges do not depend on the number of ranks, so neither do the bits."""
    options = ["--model.calibration.method", "brecq", "--model.calibration.images_per_batch", "2"]
    options += ["--model.config.activation", RANGES]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for name, extra in (("one", []), ("two", two)):
        command = [sys.executable, "-m", "modiff.lit.cli", "quantize", "--config", str(calibrated), *options, *extra]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["MODIFF_CACHE"] = str(tmp_path / f"cache-{name}")
        command += ["--output", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Calibrating by brecq") == 1
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")


def test_ranks_share_the_images_in_turn(tiny_teacher, monkeypatch) -> None:
    module = module_of(tiny_teacher, num_images=5, images_per_batch=2)
    seen: list[list[int]] = []
    monkeypatch.setattr(LitStudent, "trace", lambda self, bound, indices, *_: seen.append(indices.tolist()))
    for rank in range(2):
        callback_module.draw(module, module.calibration, module.student, rank, 2)
    assert seen == [[0, 1], [4], [2, 3]]


def test_ctrl_c_then_the_same_command_goes_on(calibrated, modiff, tmp_path, monkeypatch, cache) -> None:
    args = ("quantize", "--config", calibrated, "--model.calibration.stage_size", "4")
    assert modiff(*args, "--output", tmp_path / "whole")[0] == 0
    shutil.rmtree(cache)

    def stop(trainer, done, total, what, left):
        if done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(callback_module, "tell", stop)
        status, _, err = modiff(*args, "--output", tmp_path / "again")
    assert status == 130
    assert "interrupted; the same command goes on where this one stopped" in err
    assert stages(cache) == 2
    assert not (tmp_path / "again").exists()
    seen = []
    monkeypatch.setattr(callback_module, "tell", lambda trainer, *args: seen.append(args))
    status, said, err = modiff(*args, "--output", tmp_path / "again")
    assert status == 0, err
    assert "2 stages were done before" in said
    assert [call[3] is None for call in seen[:3]] == [True, True, False]
    assert tensors_of(tmp_path / "again") == tensors_of(tmp_path / "whole")


def tensors_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["gptq", pytest.param("brecq", marks=pytest.mark.slow)])
def test_killed_process_goes_on_and_gives_the_same_bits(calibrated, tmp_path, method) -> None:
    options = ["--model.calibration.method", method, "--model.calibration.stage_size", "2"]
    options += ["--model.calibration.iterations", "20", "--model.calibration.num_images", "8"]
    base = [sys.executable, "-m", "modiff.lit.cli", "quantize", "--config", str(calibrated), *options]

    def start(name: str) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["MODIFF_CACHE"] = str(tmp_path / name)
        command = [*base, "--output", str(tmp_path / f"{name}-student")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    whole = start("whole")
    killed = start("killed")
    while stages(tmp_path / "killed") < 2:
        assert killed.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    killed.stdout.close()
    done = stages(tmp_path / "killed")
    assert not (tmp_path / "killed-student").exists()
    again = start("killed")
    said = again.communicate(timeout=200)[0]
    assert again.returncode == 0
    assert f"{done} stages were done before" in said
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    assert tensors_of(tmp_path / "killed-student") == tensors_of(tmp_path / "whole-student")


def test_second_process_waits_for_the_first(tmp_path) -> None:
    # Locks are of open files, so a thread that opens the file again stands for another process.
    said, held = [], threading.Event()

    def other() -> None:
        with locked(tmp_path, said.append):
            held.set()

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        assert not held.wait(0.3)
        assert said == [f"Another process is at this calibration ({tmp_path}); waiting for it."]
    thread.join(60)
    assert held.is_set()


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


def test_damaged_cache_is_refused_and_named(calibrated, modiff, tmp_path, cache) -> None:
    assert modiff("quantize", "--config", calibrated, "--output", tmp_path / "one")[0] == 0
    (kept,) = (cache / "calibrations").iterdir()
    file = kept / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    status, _, err = modiff("quantize", "--config", calibrated, "--output", tmp_path / "two")
    assert status == 1
    assert f"The calibration in {kept / 'student'} cannot be used" in err
    assert f"Or delete {kept / 'student'}." in err
    assert not (tmp_path / "two").exists()


def test_more_buckets_than_steps(calibrated, modiff, tmp_path) -> None:
    options = ("--model.config.activation", RANGES.replace("}", ", timestep_buckets: 9}"))
    status, _, err = modiff("quantize", "--config", calibrated, *options, "--output", tmp_path / "out")
    assert status == 1
    assert "timestep_buckets is 9, but a trajectory has 4 evaluations only. Use at most 4." in err
    assert not (tmp_path / "out").exists()


def test_cache_that_cannot_be_written(calibrated, modiff, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "file"))
    status, _, err = modiff("quantize", "--config", calibrated, "--output", tmp_path / "out")
    assert status == 1
    assert "cannot be written: Not a directory. Set MODIFF_CACHE to another folder" in err


def test_output_that_holds_something_is_refused_before_the_calibration(calibrated, modiff, calls, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    status, _, err = modiff("quantize", "--config", calibrated, "--output", tmp_path / "out")
    assert status == 1
    assert "holds files that are not a checkpoint of modiff" in err
    status, _, err = modiff("quantize", "--config", calibrated, "--ckpt", "x", "--output", tmp_path / "new")
    assert status == 1
    assert calls == []


def test_full_disk_while_a_stage_is_kept(calibrated, modiff, tmp_path, monkeypatch, cache) -> None:
    import modiff.storage as storage

    real, written = storage.save_file, []

    def full(tensors, path, metadata=None):
        if written:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    args = ("quantize", "--config", calibrated, "--model.calibration.stage_size", "4", "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", full)
        status, _, err = modiff(*args)
    assert status == 1
    assert "A finished stage of the calibration cannot be kept" in err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    (folder,) = (cache / "calibrations").iterdir()
    assert [path.name for path in (folder / "stages").iterdir()] == ["stage-0000"]
    assert modiff(*args)[0] == 0


def test_nothing_is_drawn_by_quantize() -> None:
    assert list(quantize_module.Nothing()) == []
