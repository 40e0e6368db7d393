"""What the parser refuses is said in one sentence: what was given, what is allowed, what to do."""

from __future__ import annotations

import pytest

HELP = "modiff evaluate --help lists all"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.stps", "3"], f"There is no option --model.stps; --model.steps is the nearest. {HELP}."),
        (["--nothing=3"], f"There is no option --nothing. {HELP}."),
        (["other.yaml"], f"'other.yaml' belongs to no option. A recipe is given by --config other.yaml. {HELP}."),
        (["words"], f"'words' belongs to no option. {HELP}."),
        (["--model.steps"], "--model.steps is given without a value. Give one: --model.steps=VALUE."),
        (["--model.steps", "abc"], "model.steps is 'abc'; allowed are whole numbers, null."),
        (["--model.eta", "abc"], "model.eta is 'abc'; allowed are numbers."),
        (["--overwrite", "maybe"], "overwrite is 'maybe'; allowed are true, false."),
        (["--num_images", "x"], "num_images is 'x'; allowed are whole numbers, null."),
        (["--trainer.precision", "7"], "trainer.precision is '7'; allowed are 64, 32, 16, transformer-engine, transf"),
        (["--wandb", "sometimes"], "wandb is 'sometimes'; allowed are auto, online, offline, disabled."),
        (["--model.teacher", "x"], "model.teacher is 'x', which is no mapping. Give its fields one by one: --model.te"),
        (["--trainer.devices", "two"], "trainer.devices is 'two'; give a whole number, a list, or auto."),
        (["--seed", "-1"], "seed is -1; allowed are whole numbers, 0 to 4294967295."),
    ],
)
def test_options(modiff, recipe, tmp_path, options, message) -> None:
    status, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert err.startswith(f"modiff evaluate: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n  steps:", "\n  stps:", f"A recipe has no field model.stps; model.steps is the nearest. {HELP} fields."),
        ("seed:", "sed:", f"A recipe has no field sed; seed is the nearest. {HELP} fields."),
        ("steps: 4", "steps: many", "model.steps is 'many'; allowed are whole numbers, null."),
    ],
)
def test_recipes(modiff, recipe, tmp_path, old, new, message) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    status, _, err = modiff("evaluate", "--config", recipe, "--output", tmp_path / "out")
    assert (status, err) == (1, f"modiff evaluate: {message}\n")
    assert not (tmp_path / "out").exists()


def test_folder_in_place_of_a_recipe(modiff, tmp_path) -> None:
    for command in (("evaluate", "--config"), ("compare",), ("bench",)):
        status, _, err = modiff(*command, tmp_path)
        assert status == 1
        assert f"Recipe {tmp_path} is a folder. Give a file, such as recipes/" in err


def test_what_is_required(modiff) -> None:
    status, _, err = modiff("statistics", "--features", "x")
    assert (status, err) == (
        1,
        "modiff statistics: These are missing: output. modiff statistics --help explains them.\n",
    )
    status, _, err = modiff("train", "--config", "nowhere.yaml")
    assert status == 1
    assert "nowhere.yaml does not exist. Give a file." in err


def test_what_only_lightning_refuses(modiff, recipe, tmp_path) -> None:
    options = ("--trainer.num_nodes", "0", "--output", tmp_path / "out")
    status, _, err = modiff("evaluate", "--config", recipe, *options)
    message = "modiff evaluate: Lightning refuses the trainer's arguments: `num_nodes` must be a positive integer, but"
    assert status == 1
    assert err.startswith(message)
    assert err.count("\n") == 1
