"""``modiff compare``: several recipes against the same teacher images, one table, one picture."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from modiff.errors import ConfigError
from modiff.lit.cli.base import recipe_name
from modiff.lit.cli.errors import parse_plainly
from modiff.lit.cli.student import StudentCLI
from modiff.lit.cli.sweeps import Arm, is_sweep, sweep_arms
from modiff.lit.commands.evaluate import evaluate_recipe
from modiff.lit.report import plots
from modiff.lit.report.image_grids import labelled_rows, save_picture
from modiff.lit.report.pages import COMPARED_SAMPLES, SAMPLES, write_compare_report
from modiff.lit.report.result import Result
from modiff.lit.report.tables import FULL_PRECISION, markdown_table, metrics_table
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.running import rank_zero, running
from modiff.storage.atomic import write_json, write_text
from modiff.storage.hashing import short_hash

TEACHER_FIELDS = ("teacher", "scheduler", "scheduler_options", "steps", "eta", "guidance", "features", "reference")
FORWARDED = ("--model.", "--data.", "--trainer.")


def make_parser() -> ArgumentParser:
    """Make the parser of ``modiff compare``."""
    parser = ArgumentParser(
        prog="modiff compare",
        exit_on_error=False,
        description="Evaluate several recipes against the same teacher images, drawn once. Options that begin with "
        "--model., --data. or --trainer. go to every recipe.",
    )
    parser.add_argument("recipes", nargs="+", type=str, help="Recipes of modiff evaluate, or sweeps over them.")
    parser.add_argument("--output", type=str, default="runs/compare", help="Directory of the comparison.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace another run in --output.")
    parser.add_argument("--num_images", type=int | None, default=None, help="Images; None: what the recipes say.")
    parser.add_argument("--ckpt", type=str | None, default=None, help="Checkpoint to start from.")
    parser.add_argument("--seed", type=int | None, default=None, help="Seed; None: what the recipes say.")
    parser.add_argument(
        "--wandb", type=Literal["auto", "online", "offline", "disabled"], default="auto", help="Weights & Biases."
    )
    return parser


def compare(args: Sequence[str]) -> int:
    """``modiff compare A.yaml B.yaml ...``."""
    own, forwarded = split_forwarded(args)
    options = parse_plainly(make_parser(), own)
    folder = Path(options.output)
    # Every recipe is parsed before anything is written or drawn.
    clis = {arm.name: _parse(arm, options, forwarded) for arm in arms_of(options.recipes)}
    shared = shared_identity(clis)
    identity = {"command": "compare", "recipes": {name: cli.identity() for name, cli in clis.items()}}
    run = RunDirectory(folder, identity, options.overwrite)
    teacher_images = folder / "teacher"
    rows: list[tuple[str, Result]] = []
    with running(run):
        rank_zero(run.claim, "compare")
        for position, (name, cli) in enumerate(clis.items(), start=1):
            images = f"{cli.num_images} images, {cli.config.model.steps} steps"
            rank_zero(print, f"\n[{position}/{len(clis)}] {name}: {images}")
            rows.append((name, evaluate_recipe(cli, teacher_images, group=f"compare-{short_hash(shared)}")))
        rank_zero(_finish, run, rows)
    return 0


def split_forwarded(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the command's own options and those that go to every recipe.

    >>> split_forwarded(["a.yaml", "--model.steps", "20", "--seed=1", "--data.batch_size=8"])
    (['a.yaml', '--seed=1'], ['--model.steps', '20', '--data.batch_size=8'])
    """
    own, forwarded, tokens = [], [], list(args)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith(FORWARDED):
            own.append(token)
            continue
        forwarded.append(token)
        if "=" not in token and tokens:
            forwarded.append(tokens.pop(0))
    return own, forwarded


def unique_names(recipes: Sequence[str]) -> list[str]:
    """Short names of the recipes, which name their folders.

    Raises:
        ConfigError: Two recipes have the same name.
    """
    names = [Path(recipe_name(recipe)).name for recipe in recipes]
    if len(set(names)) < len(names):
        names = [recipe_name(recipe).replace("/", "-") for recipe in recipes]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two recipes have the same name: {', '.join(names)}. Give each once, or rename one.")
    return names


def arms_of(recipes: Sequence[str]) -> list[Arm]:
    """The recipes, and the runs of sweeps among them, each with a name of its own."""
    plain = [recipe for recipe in recipes if not is_sweep(recipe)]
    named = dict(zip(plain, unique_names(plain), strict=True))
    arms: list[Arm] = []
    for recipe in recipes:
        arms += [Arm(named[recipe], recipe)] if recipe in named else sweep_arms(recipe)
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"Two runs have the same name: {twice}. Give each recipe and sweep once.")
    return arms


def shared_identity(clis: dict[str, StudentCLI]) -> dict[str, Any]:
    """Everything that the teacher's images depend on; all recipes must agree on it.

    Raises:
        ConfigError: Two recipes differ in it.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, cli in clis.items():
        identity = cli.identity()
        model = identity.pop("model")
        found[name] = {**identity, **{key: model[key] for key in TEACHER_FIELDS}}
    first_name, first = next(iter(found.items()))
    for name, other in found.items():
        if other.get("conditions") != first.get("conditions"):
            raise ConfigError(
                f"{first_name} and {name} differ in their labels or prompts, so they have different teacher images. "
                "Give the same to all of them: --data.labels or --data.prompts."
            )
        for key, value in other.items():
            if value != first[key]:
                option = {"num_images": "--num_images", "seed": "--seed", "batch_size": "--data.batch_size"}.get(
                    key, f"--trainer.{key}" if key == "precision" else f"--model.{key}"
                )
                raise ConfigError(
                    f"{first_name} and {name} differ in {key} ({first[key]!r} and {value!r}), so they have different "
                    f"teacher images. Set it for all of them, for example {option} {first[key]}."
                )
    return first


def _parse(arm: Arm, options: Namespace, forwarded: list[str]) -> StudentCLI:
    args = ["--config", arm.recipe, *arm.options, *forwarded, "--output", str(Path(options.output) / arm.name)]
    args += ["--overwrite", str(options.overwrite).lower(), "--wandb", options.wandb]
    for key in ("num_images", "ckpt", "seed"):
        if options[key] is not None:
            args += [f"--{key}", str(options[key])]
    return StudentCLI("evaluate", args)


def _finish(run: RunDirectory, rows: list[tuple[str, Result]]) -> None:
    folder = run.path
    samples: dict[str, Tensor] = {}
    for name, _ in rows:
        images = load_file(str(folder / name / SAMPLES))
        samples.setdefault(FULL_PRECISION, images["teacher"])
        samples[name] = images["student"]
    shown = [(name, images[:COMPARED_SAMPLES]) for name, images in samples.items()]
    save_picture(labelled_rows(shown), folder / "samples.png")
    plots.compare_plot(rows, folder / "compare.png")
    write_json(folder / "compare.json", {name: result.as_json() for name, result in rows})
    write_text(folder / "compare.md", markdown_table(rows))
    reports = {name: folder / name / "report.html" for name, _ in rows}
    report = write_compare_report(folder, rows, samples, reports)
    run.mark("complete")
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    Console(width=None).print(metrics_table(rows))
    print(f"Report: {report}")
