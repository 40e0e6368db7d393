"""Runs of a calibration by recipe: progress, ranks, restarts, caches and disks that fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich.progress
from calibrations import RANGES, module_of, tensors_of

from modiff.errors import CheckpointError
from modiff.lit.callbacks import calibration as callback_module
from modiff.lit.callbacks.calibration import Calibration
from modiff.lit.callbacks.progress import EvaluationProgressBar, LineProgress
from modiff.lit.modules.student import LitStudent

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
        command = [
            sys.executable,
            "-m",
            "modiff.lit.cli.main",
            "quantize",
            "--config",
            str(calibrated),
            *options,
            *extra,
        ]
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
    monkeypatch.setattr(LitStudent, "denoise", lambda self, bound, indices, *_: seen.append(indices.tolist()))
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


@pytest.mark.parametrize("method", ["gptq", pytest.param("brecq", marks=pytest.mark.slow)])
def test_killed_process_goes_on_and_gives_the_same_bits(calibrated, tmp_path, method) -> None:
    options = ["--model.calibration.method", method, "--model.calibration.stage_size", "2"]
    options += ["--model.calibration.iterations", "20", "--model.calibration.num_images", "8"]
    base = [sys.executable, "-m", "modiff.lit.cli.main", "quantize", "--config", str(calibrated), *options]

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


# --- caches and disks that fail ---------------------------------------------------------------------------------------


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


def test_a_cache_that_cannot_be_written_costs_one_line(calibrated, modiff, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "file"))
    status, said, err = modiff("quantize", "--config", calibrated, "--output", tmp_path / "out")
    assert status == 0, err
    assert (said + err).count("The cache cannot be used (") == 1
    assert "Not a directory): nothing is kept. Set MODIFF_CACHE to a folder that can be written." in said + err


def test_full_disk_while_a_stage_is_kept(calibrated, modiff, tmp_path, monkeypatch, cache) -> None:
    import modiff.storage.folder as storage

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


def test_full_disk_while_the_result_is_kept(calibrated, modiff, tmp_path, monkeypatch, cache) -> None:
    """All stages are done; what cannot be kept is said, and the next start has only the result to write."""
    args = ("quantize", "--config", calibrated, "--output", tmp_path / "out")

    def full(*_, **__):
        raise CheckpointError("the disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(callback_module, "save", full)
        status, _, err = modiff(*args)
    assert status == 1
    assert "The finished calibration cannot be kept: the disk is full." in err
    assert not (tmp_path / "out").exists()
    done = stages(cache)
    assert done > 0
    status, said, _ = modiff(*args)
    assert status == 0
    assert f"{done} stages were done before" in said
