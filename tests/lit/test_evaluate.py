"""``modiff evaluate``: what it writes, what it refuses, and how it goes on after a stop."""

from __future__ import annotations

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from modiff.lit.modules.student import LitStudent

FILES = {
    "config.yaml",
    "cost.json",
    "cost.png",
    "images",
    "logs",
    "metrics.json",
    "report.html",
    "run.json",
    "samples.png",
    "samples.safetensors",
    "trajectory_errors.json",
    "trajectory_errors.png",
}


def read(folder: Path, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


def without_times(folder: Path) -> dict:
    """The metrics that a repetition has to give bit for bit."""
    changing = ("seconds", "seconds_per_image_evaluation", "time_ratio")
    return {key: value for key, value in read(folder).items() if key not in changing}


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[str, int]]:
    """Who drew which batch, in order."""
    calls: list[tuple[str, int]] = []
    draw = LitStudent.draw

    def counted(self, who, indices):
        calls.append((who, int(indices[0])))
        return draw(self, who, indices)

    monkeypatch.setattr(LitStudent, "draw", counted)
    return calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe_text) -> tuple[Path, Path]:
    """A recipe of 10 images in batches of 4, and its finished run."""
    from modiff.lit.cli.main import main

    folder = tmp_path_factory.mktemp("finished")
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe_text.replace("num_images: 8", "num_images: 10"))
    assert main(["evaluate", "--config", str(recipe), "--save_images", "true", "--output", str(folder / "out")]) == 0
    return recipe, folder / "out"


def test_directory_holds_every_file_and_nothing_else(finished) -> None:
    _, out = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert read(out, "run.json")["status"] == "complete"
    report = (out / "report.html").read_text()
    assert 'src="data:image/png;base64,' in report
    assert "samples.png" not in report.replace("data:image", "")


def test_metrics_have_every_key(finished) -> None:
    metrics = read(finished[1])
    assert metrics["teacher"]["fid"] is None
    assert metrics["student"]["fid"] is None
    assert "no reference images" in metrics["reasons"]["student.fid"]
    assert metrics["student"]["fid_to_teacher"] > 0
    assert metrics["student"]["psnr_db"] > 10
    assert 0 < metrics["student"]["relative_l2"] < 1
    assert metrics["features"]["network"] == "tiny-features"
    assert metrics["features"]["num_images"] == metrics["num_images"] == 10
    assert {"gbops_per_evaluation", "weight_mib", "state_mib_per_image"} <= set(metrics["cost"])
    assert metrics["evaluations"] == {"total": 4, "quantized": 3}
    assert metrics["time_ratio"] > 0
    assert set(metrics["seconds_per_image_evaluation"]) == {"teacher", "student"}
    assert metrics["seconds"] > 0
    assert metrics["seed"] == 0


def test_provenance_says_where_a_result_comes_from(finished) -> None:
    found = read(finished[1])["provenance"]
    assert found["recipe"] == "tiny"
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["world_size"] == 1
    assert found["threads"] == torch.get_num_threads()
    for key in ("recipe_hash", "teacher_hash", "seed", "git_commit", "python", "modiff", "lightning", "device"):
        assert key in found
    assert len(found["recipe_hash"]) == 16


def test_pictures_show_teacher_above_student(finished) -> None:
    samples = load_file(str(finished[1] / "samples.safetensors"))
    assert {name: tuple(images.shape) for name, images in samples.items()} == {
        "teacher": (4, 1, 8, 8),
        "student": (4, 1, 8, 8),
    }
    for who in ("teacher", "student"):
        files = sorted((finished[1] / "images" / who).iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
        with Image.open(files[3]) as file:
            pixels = torch.from_numpy(np.array(file))
        assert torch.equal(pixels.long(), (samples[who][3, 0] * 255).round().long())


def test_complete_run_is_not_repeated(finished, modiff, drawn) -> None:
    recipe, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    status, said, _ = modiff("evaluate", "--config", recipe, "--save_images", "true", "--output", out)
    assert status == 0
    assert "holds this very run, complete; nothing to do (--overwrite true repeats it)" in said
    assert drawn == []
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_another_recipe_is_refused_until_overwrite(finished, modiff, tmp_path) -> None:
    recipe, out = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    args = ("evaluate", "--config", recipe, "--model.preset", "w8a8-ptq", "--num_images", "4", "--output", copy)
    status, _, err = modiff(*args)
    assert status == 1
    assert f"--output {copy} holds another run (tiny): add --overwrite true to replace it" in err
    assert without_times(copy) == without_times(out)
    status, _, err = modiff(*args, "--overwrite", "true")
    assert status == 0, err
    assert read(copy)["evaluations"] == {"total": 4, "quantized": 4}
    assert not (copy / "images").exists()


def test_files_that_are_no_run_are_never_deleted(recipe, modiff, tmp_path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("years of work")
    status, _, err = modiff("evaluate", "--config", recipe, "--output", out, "--overwrite", "true")
    assert status == 1
    assert "holds files that are not a run of modiff: give another --output" in err
    assert (out / "chapter.tex").read_text() == "years of work"
    status, _, err = modiff("evaluate", "--config", recipe, "--output", out / "chapter.tex")
    assert status == 1
    assert "is a file. Give a directory." in err


def test_identical_images_have_no_psnr(recipe, modiff, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--model.preset", "w32a32-ptq", "--num_images", "6", "--error_images", "0", "--timing_rounds", "0")
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", out)
    assert status == 0, err
    metrics = read(out)
    assert metrics["student"]["psnr_db"] is None
    assert metrics["student"]["relative_l2"] == 0
    assert metrics["evaluations"] == {"total": 4, "quantized": 0}
    assert metrics["student"]["fid_to_teacher"] is None  # 6 images, 4 features
    assert "8 student images are needed, 6 were drawn" in metrics["reasons"]["student.fid_to_teacher"]
    assert metrics["time_ratio"] is None
    assert not (out / "trajectory_errors.png").exists()
    assert "not available" in (out / "report.html").read_text()


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
    from modiff.lit.runs import writer

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
        patch.setattr("modiff.lit.runs.batches.save_file", full)
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


def test_sample_draws_the_students_images_and_the_teachers(finished, recipe, modiff, tmp_path) -> None:
    args = ("sample", "--config", recipe, "--num_images", "3")
    status, said, err = modiff(*args, "--output", tmp_path / "student")
    assert status == 0, err
    assert f"3 images in {tmp_path}/student/images" in said
    teacher_args = (*args, "--model.preset", "null", "--output", tmp_path / "teacher")
    assert modiff(*teacher_args)[0] == 0
    expected = load_file(str(finished[1] / "samples.safetensors"))
    for who in ("student", "teacher"):
        found = load_file(str(tmp_path / who / "samples.safetensors"))
        assert torch.equal(found["student"], expected[who][:3])
    assert read(tmp_path / "student", "sample.json")["evaluations"] == {"total": 4, "quantized": 3}
    assert "nothing to do" in modiff(*teacher_args)[1]


def test_packed_student_gives_the_same_images(finished, recipe, modiff, tmp_path) -> None:
    status, said, err = modiff("quantize", "--config", recipe, "--output", tmp_path / "packed")
    assert status == 0, err
    assert f"modiff evaluate --ckpt {tmp_path}/packed" in said
    options = ("--ckpt", tmp_path / "packed", "--model.preset", "null", "--num_images", "4")
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    expected = (finished[1] / "samples.safetensors").read_bytes()
    assert (tmp_path / "out" / "samples.safetensors").read_bytes() == expected


def test_packed_student_shares_what_is_not_quantized_and_leaves_the_teacher_alone(recipe, modiff, tmp_path) -> None:
    from modiff.lit.cli.student import StudentCLI

    assert modiff("quantize", "--config", recipe, "--output", tmp_path / "packed")[0] == 0
    options = ("--config", str(recipe), "--model.preset", "null")
    plain, loaded = (
        StudentCLI("sample", [*options, *more]).model for more in ((), ("--ckpt", str(tmp_path / "packed")))
    )
    for module in (plain, loaded):
        module.configure_model()
    expected, found = plain.teacher.state_dict(), loaded.teacher.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.student.conv_norm_out.weight is loaded.teacher.conv_norm_out.weight
    assert loaded.student.conv_in.module.weight is loaded.teacher.conv_in.weight


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_compile_compiles_the_student_once_before_anything_is_drawn(
    recipe, modiff, tmp_path, monkeypatch, command
) -> None:
    happened: list[str] = []
    draw = LitStudent.draw
    monkeypatch.setattr(
        "modiff.lit.modules.student.compile_student", lambda student: happened.append(type(student).__name__)
    )
    monkeypatch.setattr(LitStudent, "draw", lambda self, who, i: (happened.append(who), draw(self, who, i))[1])
    quick = ("--num_images", "4", "--output", tmp_path / "out")
    quick += ("--timing_rounds", "0", "--error_images", "0") if command == "evaluate" else ()
    status, _, err = modiff(command, "--config", recipe, "--model.compile", "true", *quick)
    assert status == 0, err
    assert happened == ["UNet2DModel", *(["teacher"] if command == "evaluate" else []), "student"]
    happened.clear()
    status, _, err = modiff(command, "--config", recipe, *quick, "--overwrite", "true")
    assert status == 0, err
    assert "UNet2DModel" not in happened


def test_dtype_of_what_is_not_quantized_is_an_option(recipe, modiff, tmp_path) -> None:
    for name, options in (("as_is", ()), ("half", ("--remainder_dtype", "float16"))):
        status, _, err = modiff("quantize", "--config", recipe, *options, "--output", tmp_path / name)
        assert status == 0, err
    as_is, half = (load_file(tmp_path / name / "model.safetensors") for name in ("as_is", "half"))
    assert (as_is["conv_in.bias"].dtype, half["conv_in.bias"].dtype) == (torch.float32, torch.float16)
    assert torch.equal(as_is["conv_in.weight.codes"], half["conv_in.weight.codes"])
    status, _, err = modiff("quantize", "--config", recipe, "--remainder_dtype", "int8", "--output", tmp_path / "no")
    assert status == 1
    assert "remainder_dtype" in err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_missing_packed_student(recipe, modiff, tmp_path, command) -> None:
    options = ("--ckpt", "nowhere", "--model.preset", "null")
    status, _, err = modiff(command, "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert "nowhere does not exist. Give a directory that modiff.save wrote" in err
    assert not (tmp_path / "out").exists()


def test_saved_recipe_says_what_ran(finished) -> None:
    saved = yaml.safe_load((finished[1] / "config.yaml").read_text())
    assert saved["model"]["preset"] is None
    assert saved["model"]["config"]["activation"]["bits"] == 4
    assert saved["num_images"] == 10
    assert saved["trainer"]["inference_mode"] is False


def test_teacher_without_feature_network(recipe, modiff, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("--model.features", "null", "--num_images", "4", "--timing_rounds", "0", "--error_images", "0")
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", out)
    assert status == 0, err
    metrics = read(out)
    assert metrics["features"] == {"network": None, "num_features": None, "num_images": None}
    for who, key in (("teacher", "fid"), ("student", "fid"), ("student", "fid_to_teacher")):
        assert metrics[who][key] is None
        assert "give model.features" in metrics["reasons"][f"{who}.{key}"]
    assert "Not measured: --error_images was 0" in (out / "report.html").read_text()


def test_fewer_images_than_a_batch(recipe, modiff, tmp_path, drawn) -> None:
    out = tmp_path / "out"
    options = ("--num_images", "1", "--timing_rounds", "0", "--error_images", "0")
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", out)
    assert status == 0, err
    assert drawn == [("teacher", 0), ("student", 0)]
    assert tuple(load_file(str(out / "samples.safetensors"))["student"].shape) == (1, 1, 8, 8)
    assert read(out)["num_images"] == 1
