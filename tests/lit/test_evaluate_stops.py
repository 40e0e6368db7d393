"""``modiff evaluate`` after a stop, on a full disk, and with damaged files: nothing half, nothing lost."""

from __future__ import annotations

import errno
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modiff.lit.modules.student import LitStudent
from tests.lit.runs import FILES, read, without_times


def test_interrupted_run_goes_on_bit_for_bit(finished, modiff, tmp_path, monkeypatch) -> None:
    recipe, complete = finished
    out = tmp_path / "out"
    args = ("evaluate", "--config", recipe, "--save_images", "true", "--output", out)
    draw = LitStudent.draw

    def stop(self, who, indices):
        if who == "student" and int(indices[0]) == 4:
            raise KeyboardInterrupt
        return draw(self, who, indices)

    with monkeypatch.context() as patch:
        patch.setattr(LitStudent, "draw", stop)
        status, _, err = modiff(*args)
    assert status == 130
    assert "interrupted; the same command goes on where this one stopped" in err
    assert read(out, "run.json")["status"] == "interrupted"
    assert not (out / "metrics.json").exists()

    calls = []
    monkeypatch.setattr(LitStudent, "draw", lambda s, who, i: (calls.append((who, int(i[0]))), draw(s, who, i))[1])
    status, _, err = modiff(*args)
    assert status == 0, err
    assert calls == [("teacher", 4), ("student", 4), ("teacher", 8), ("student", 8)]
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "samples.safetensors").read_bytes() == (complete / "samples.safetensors").read_bytes()
    mine, whole = without_times(out), without_times(complete)
    assert mine == whole
    assert read(out, "trajectory_errors.json") == read(complete, "trajectory_errors.json")


def test_damaged_batch_is_drawn_again(recipe, modiff, tmp_path, monkeypatch, drawn) -> None:
    out = tmp_path / "out"
    from modiff.lit.runs import results as writer

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert modiff("evaluate", "--config", recipe, "--output", out)[0] == 130
    batch = out / "partial" / "batch_00000004.safetensors"
    batch.write_bytes(batch.read_bytes()[:-8])
    drawn.clear()
    assert modiff("evaluate", "--config", recipe, "--output", out)[0] == 0
    assert drawn == [("teacher", 4), ("student", 4)]


def test_full_disk_leaves_no_half_file_and_what_was_there(recipe, modiff, tmp_path, monkeypatch) -> None:
    out, saved = tmp_path / "out", []

    def full(tensors, path, metadata=None):
        if saved:
            Path(path).write_bytes(b"half a file")
            raise safetensors_error()
        saved.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("modiff.lit.runs.batch_store.save_file", full)
        status, _, err = modiff("evaluate", "--config", recipe, "--output", out)
    assert status == 1
    assert err == f"modiff evaluate: No space left on device ({out}/partial/batch_00000004.safetensors).\n"
    assert [path.name for path in (out / "partial").iterdir()] == ["batch_00000000.safetensors"]
    assert modiff("evaluate", "--config", recipe, "--output", out)[0] == 0


def safetensors_error() -> Exception:
    """What safetensors raises on a full disk; it is no OSError."""
    from safetensors import SafetensorError

    return SafetensorError(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")


def test_full_disk_while_the_report_is_written(recipe, modiff, tmp_path, monkeypatch) -> None:
    out, write_text = tmp_path / "out", Path.write_text

    def full(self, text, *args, **kwargs):
        if "metrics" in self.name:
            write_text(self, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        status, _, err = modiff("evaluate", "--config", recipe, "--output", out)
    assert status == 1
    assert err == f"modiff evaluate: No space left on device ({out}/metrics.json).\n"
    assert not [path for path in out.rglob("*metrics*") if path.parent == out]
    assert len(list((out / "partial").iterdir())) == 2


def damaged_teacher(teacher: Path, folder: Path, change) -> Path:
    shutil.copytree(teacher, folder)
    change(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def poison(name: str, path: Path) -> None:
    tensors = load_file(str(path))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, str(path), {"format": "pt"})


@pytest.mark.parametrize(("change", "message"), [(truncate, "are damaged"), (Path.unlink, "does not exist")])
def test_damaged_teacher_writes_nothing(recipe, modiff, tiny_teacher, tmp_path, change, message) -> None:
    teacher = damaged_teacher(tiny_teacher, tmp_path / "broken", change)
    options = ("--model.teacher.path", teacher)
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert err.startswith("modiff evaluate: Teacher 'broken': ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_truncated_feature_network_writes_nothing(recipe, modiff, tiny_features, tmp_path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny_features.read_bytes()[:-10])
    options = ("--model.features", broken)
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert f"{broken} is not a feature network of modiff, or is damaged" in err
    assert not (tmp_path / "out").exists()


def test_nan_in_the_teacher_is_reported_with_its_place(recipe, modiff, tiny_teacher, tmp_path) -> None:
    change = partial(poison, "mid_block.resnets.0.conv1.bias")
    teacher = damaged_teacher(tiny_teacher, tmp_path / "poisoned", change)
    options = ("--model.teacher.path", teacher)
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert "NaN or Inf in the input of operator 'mid_block" in err
    assert "first in evaluation 0" in err  # already in the evaluation that measures the state
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_nan_in_a_weight_writes_nothing(recipe, modiff, tiny_teacher, tmp_path) -> None:
    teacher = damaged_teacher(tiny_teacher, tmp_path / "poisoned", partial(poison, "mid_block.resnets.0.conv1.weight"))
    options = ("--model.teacher.path", teacher)
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert "The weight of operator 'mid_block.resnets.0.conv1' holds NaN or Inf, so it cannot be quantized" in err
    assert not (tmp_path / "out").exists()
