"""``modiff evaluate``: what it writes, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.lit.runs import FILES, read, without_times


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
    assert f"--output {copy} holds another run (tiny), which differs in model.config" in err
    assert "add --overwrite true to replace it" in err
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
