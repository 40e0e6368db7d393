"""``modiff sample`` and ``modiff quantize``, and ``modiff evaluate`` of what they wrote."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from modiff.lit.modules.student import LitStudent
from tests.lit.runs import read


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
        StudentCLI("sample", [*options, *more]).prepare_model() for more in ((), ("--ckpt", str(tmp_path / "packed")))
    )
    expected, found = plain.teacher.state_dict(), loaded.teacher.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.student.conv_norm_out.weight is loaded.teacher.conv_norm_out.weight
    assert loaded.student.conv_in.module.weight is loaded.teacher.conv_in.weight


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


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_compile_compiles_the_student_once_before_anything_is_drawn(
    recipe, modiff, tmp_path, monkeypatch, command
) -> None:
    happened: list[str] = []
    draw = LitStudent.draw
    monkeypatch.setattr(
        "modiff.lit.modules.student.compile_student",
        lambda student, **options: happened.append(type(student).__name__),
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
