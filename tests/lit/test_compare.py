"""``modiff compare``: one teacher, several students."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modiff.lit.modules.student import LitStudent

QUICK = ("--num_images", "6", "--wandb", "disabled")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, recipe_text) -> list[Path]:
    """Two recipes that differ in their quantization."""
    folder = tmp_path_factory.mktemp("recipes")
    paths = []
    for name, preset in (("plain", "w8a4-ptq-paper"), ("modulated", "w8a4-modiff-paper")):
        paths.append(folder / f"{name}.yaml")
        text = recipe_text.replace("w8a4-modiff", preset).replace("timing_rounds: 1", "timing_rounds: 0")
        paths[-1].write_text(text)
    return paths


@pytest.fixture(scope="module")
def compared(tmp_path_factory, recipes) -> tuple[Path, list[tuple[str, int]], str]:
    """A finished comparison, who drew what, and the output."""
    import contextlib
    import io

    from modiff.lit.cli.main import main

    calls, said = [], io.StringIO()
    draw = LitStudent.draw
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(LitStudent, "draw", lambda s, who, i: (calls.append((who, int(i[0]))), draw(s, who, i))[1])
        out = tmp_path_factory.mktemp("compared") / "out"
        assert main(["compare", *map(str, recipes), *QUICK, "--output", str(out)]) == 0
    return out, calls, said.getvalue()


def test_teacher_is_drawn_once_for_all(compared) -> None:
    out, calls, _ = compared
    assert calls == [("teacher", 0), ("student", 0), ("teacher", 4), ("student", 4), ("student", 0), ("student", 4)]
    images = [load_file(str(out / name / "samples.safetensors")) for name in ("plain", "modulated")]
    assert images[0]["teacher"].equal(images[1]["teacher"])
    assert not images[0]["student"].equal(images[1]["student"])


def test_comparison_holds_table_picture_and_links(compared) -> None:
    out, _, said = compared
    assert {path.name for path in out.iterdir()} == {
        ".holder.json",
        ".lock",
        "status.json",
        "compare.json",
        "compare.md",
        "compare.png",
        "modulated",
        "plain",
        "report.html",
        "run.json",
        "samples.png",
    }
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    results = json.loads((out / "compare.json").read_text())
    assert list(results) == ["plain", "modulated"]
    for name in results:
        assert results[name] == json.loads((out / name / "metrics.json").read_text())
        assert f"{name}/report.html" in (out / "report.html").read_text()
        assert f"| {name} |" in (out / "compare.md").read_text()
        assert name in said
    assert f"{out}/report.html" in said.replace("\n", "")


def test_complete_comparison_draws_nothing(compared, recipes, modiff, monkeypatch) -> None:
    monkeypatch.setattr(LitStudent, "draw", None)
    status, said, err = modiff("compare", *recipes, *QUICK, "--output", compared[0])
    assert status == 0, err
    assert said.count("nothing to do") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 4", "steps: 5"), "plain and other differ in steps (4 and 5), so they have different teacher images"),
        (("scheduler: ddim", "scheduler: ddim_trailing"), "differ in scheduler ('ddim' and 'ddim_trailing')"),
        (("seed: 0", "seed: 1"), "differ in seed (0 and 1), so they have different teacher images. Set it for all of "),
    ],
)
def test_recipes_with_other_teacher_images_are_refused(recipes, modiff, tmp_path, change, message) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(recipes[0].read_text().replace(*change))
    status, _, err = modiff("compare", recipes[0], other, "--wandb", "disabled", "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "fix"), [("seed", "--seed 0"), ("batch_size", "--data.batch_size 4"), ("steps", "--model.steps 4")]
)
def test_fix_for_differing_recipes_is_an_option_that_exists(recipes, modiff, tmp_path, key, fix) -> None:
    other = tmp_path / "other.yaml"
    changes = {"seed": ("seed: 0", "seed: 1"), "batch_size": ("size: 4", "size: 3"), "steps": ("steps: 4", "steps: 3")}
    other.write_text(recipes[0].read_text().replace(*changes[key]))
    _, _, err = modiff("compare", recipes[0], other, "--wandb", "disabled", "--output", tmp_path / "out")
    assert fix in err


def test_same_recipe_twice_is_refused(recipes, modiff, tmp_path) -> None:
    status, _, err = modiff("compare", recipes[0], recipes[0], "--output", tmp_path / "out")
    assert status == 1
    assert "Two recipes have the same name: plain, plain" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "recipes"),
        (("nowhere.yaml",), "Recipe nowhere.yaml does not exist"),
        (("{0}", "--num_imges", "3"), "num_imges"),
        (("{0}", "--model.stepps", "3"), "stepps"),
        (("{0}", "--seed", "many"), "seed"),
    ],
)
def test_wrong_option_is_refused(recipes, modiff, tmp_path, args, message) -> None:
    args = [arg.format(recipes[0]) for arg in args]
    status, _, err = modiff("compare", *args, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_forwarded_options_reach_every_recipe(recipes, tmp_path) -> None:
    from modiff.lit.cli.sweeps import Arm
    from modiff.lit.commands.compare import _parse, make_parser, split_forwarded

    args = [str(recipes[0]), "--model.steps=2", "--model.config.modulation.refresh_every", "null", "--num_images", "3"]
    own, forwarded = split_forwarded(args)
    options = make_parser().parse_args(own)
    cli = _parse(Arm("plain", str(recipes[0])), options, forwarded)
    assert (cli.model.steps, cli.num_images, cli.config.seed) == (2, 3, 0)


def test_help(modiff) -> None:
    with pytest.raises(SystemExit) as stop:
        modiff("compare", "--help")
    assert stop.value.code == 0


def test_interrupted_comparison_goes_on(compared, recipes, modiff, tmp_path, monkeypatch) -> None:
    out, draw, calls = tmp_path / "out", LitStudent.draw, []

    def stop(self, who, indices):
        calls.append((who, int(indices[0])))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return draw(self, who, indices)

    monkeypatch.setattr(LitStudent, "draw", stop)
    args = ("compare", *recipes, *QUICK, "--output", out)
    status, _, err = modiff(*args)
    assert status == 130
    assert "the same command goes on" in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert json.loads((out / "plain" / "run.json").read_text())["status"] == "complete"
    assert json.loads((out / "modulated" / "run.json").read_text())["status"] == "interrupted"
    calls.append(("between", 0))
    assert modiff(*args)[0] == 0
    assert calls[7:] == [("student", 4)]
    for name in ("plain", "modulated"):
        mine, whole = out / name / "samples.safetensors", compared[0] / name / "samples.safetensors"
        assert mine.read_bytes() == whole.read_bytes()


def test_packed_student_is_compared(recipes, modiff, tmp_path) -> None:
    assert modiff("quantize", "--config", recipes[1], "--output", tmp_path / "packed")[0] == 0
    options = ("--ckpt", tmp_path / "packed", "--model.preset", "null", "--wandb", "disabled", "--num_images", "4")
    status, _, err = modiff("compare", recipes[1], *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert list(json.loads((tmp_path / "out" / "compare.json").read_text())) == ["modulated"]
