"""``modiff search``: the cheapest setting of one teacher that keeps the quality that is asked for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from modiff.errors import ConfigError
from modiff.lit.callbacks.provenance import git_commit, package_versions
from modiff.lit.cli.base import quiet
from modiff.lit.cli.errors import parse_plainly
from modiff.lit.runs.wandb import WandbMode
from modiff.lit.search.distances import distances_of
from modiff.lit.search.frontier import sentences, write_frontier
from modiff.lit.search.goals import Quality, parse_budget, parse_cost
from modiff.lit.search.page import write_page
from modiff.lit.search.space import SearchSpace
from modiff.lit.search.study import Search
from modiff.lit.search.target import TeacherTarget
from modiff.lit.search.tracking import log_search
from modiff.teachers.zoo import TeacherSpec, load_teacher

JOURNAL = "study.journal"


def make_parser() -> ArgumentParser:
    """Parser of ``modiff search``."""
    parser = ArgumentParser(
        prog="modiff search",
        exit_on_error=False,
        description="Explore sampler, steps, bits, granularity, reuse of blocks and compilation of one teacher, and "
        "write the frontier of quality against cost with a recipe for each of its points. The same command goes on "
        "where an earlier one stopped; several processes may work on one --output.",
    )
    parser.add_argument("--config", action="config", help="Recipe of the search, such as recipes/mnist/search.yaml.")
    parser.add_argument("--quality", type=str, default="psnr_db >= 30", help="What the images must keep.")
    parser.add_argument("--cost", type=str, default="time", help="What is lowered: time, gbops or memory.")
    parser.add_argument("--budget", type=str, default="20m", help="Time to spend, such as 20m or 1h30m.")
    parser.add_argument("--images", type=int, default=8, help="Images drawn for each new setting.")
    parser.add_argument("--confirm_images", type=int, default=32, help="Images drawn again for promising settings.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images drawn at once.")
    parser.add_argument("--reference_sampler", type=str, default="dpmpp_2m", help="Sampler of the reference images.")
    parser.add_argument("--reference_steps", type=int, default=200, help="Its steps; convergence is checked.")
    parser.add_argument("--features", type=str, default=None, help="Feature network of a distance.")
    parser.add_argument("--reference", type=str, default=None, help="Its statistics of real images.")
    parser.add_argument("--output", type=str, default="runs/search", help="Directory of the search.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Start anew in --output.")
    parser.add_argument("--seed", type=int, default=0, help="Image i starts from the noise of (seed, i).")
    parser.add_argument("--wandb", type=WandbMode, default="auto", help="Weights & Biases, as for evaluate.")
    parser.add_class_arguments(TeacherSpec, "teacher")
    parser.add_class_arguments(SearchSpace, "space")
    return parser


def search(args: Sequence[str]) -> int:
    """``modiff search --config RECIPE.yaml --quality "psnr_db >= 30" --cost time --budget 20m``."""
    quiet()
    options = parse_plainly(make_parser(), args)
    quality, cost = Quality.parse(options.quality), parse_cost(options.cost)
    budget = parse_budget(options.budget)
    space = SearchSpace(**options.space.as_dict())
    space.check(quality)
    folder = claim(Path(options.output), options.overwrite)
    spec = TeacherSpec(**options.teacher.as_dict())
    teacher = load_teacher(spec)
    distances = distances_of(quality, spec, teacher, options.images, options.features, options.reference)
    target = TeacherTarget(teacher, seed=options.seed, batch_size=options.batch_size)
    study = Search(
        target=target,
        space=space,
        quality=quality,
        cost=cost,
        folder=folder,
        images=options.images,
        confirm_images=options.confirm_images,
        reference_sampler=options.reference_sampler,
        reference_steps=options.reference_steps,
        distances=distances,
        say=lambda line: print(line, flush=True),
    )
    try:
        points = study.run(budget)
    except KeyboardInterrupt:
        points = study.points()
        if points:
            report(folder, points, quality, cost, about(options, args))
        raise
    result = report(folder, points, quality, cost, about(options, args))
    log_search(options.wandb, folder, result)
    return 0


def claim(folder: Path, overwrite: bool) -> Path:
    """Take the output directory: new, empty, or of an earlier search.

    Raises:
        ConfigError: It holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file. Give a directory.")
    if folder.exists() and any(folder.iterdir()) and not (folder / JOURNAL).exists():
        raise ConfigError(f"--output {folder} holds files that are not a search. Give another --output.")
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def about(options: Namespace, args: Sequence[str]) -> dict[str, Any]:
    """What the record says of the search itself."""
    return {
        "teacher": options.teacher.as_dict(),
        "seed": options.seed,
        "reference": {"sampler": options.reference_sampler, "steps": options.reference_steps, "clipped": False},
        "command": " ".join(["modiff", "search", *args]),
        "git": git_commit(),
        "versions": package_versions(),
        "python": sys.version.split()[0],
    }


def report(folder: Path, points: list[Any], quality: Quality, cost: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Write all files, and say what was found."""
    result = write_frontier(folder, points, quality, cost, facts)
    page = write_page(folder, result)
    for line in sentences(points, quality, cost):
        print(line)
    if result["best"] is not None:
        print(f"Recipe: {folder / 'best.yaml'}")
    print(f"Frontier: {page}")
    return result
