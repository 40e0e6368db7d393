"""What a search found, as files: the frontier as JSON, a page, a plot and recipes that are ready to run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modiff.lit.search.goals import COSTS, QUALITIES, CostName, Quality
from modiff.lit.search.space import Setting
from modiff.lit.search.study import Point, cheapest, nearest, pareto
from modiff.lit.search.target import unclipped


def recipe_of(setting: Setting, teacher: dict[str, Any], num_images: int = 64) -> dict[str, Any]:
    """A recipe of ``modiff evaluate`` that draws with a setting.

    Args:
        setting: Of the search.
        teacher: ``model.teacher`` of the search's own recipe.
        num_images: Images that it draws.
    """
    config = setting.config()
    return {
        "seed": 0,
        "num_images": num_images,
        "model": {
            "teacher": teacher,
            "config": None if config is None else json.loads(json.dumps(dataclasses.asdict(config))),
            "scheduler": setting.sampler,
            "scheduler_options": unclipped(setting.sampler),
            "steps": setting.steps,
            "compile": setting.compile,
        },
    }


def sentences(points: Sequence[Point], quality: Quality, cost: CostName) -> list[str]:
    """What a search found, in words."""
    best = cheapest(list(points), quality, cost)
    unit = COSTS[cost][1]
    if best is None:
        rows = "; ".join(f"{p.setting}: {p.quality[quality.name]:.4g}" for p in nearest(list(points), quality))
        return [
            f"Nothing reached {quality} among {len(points)} settings. The nearest are {rows}. Lower the quality, give "
            "a longer --budget, or add steps and bits to the space."
        ]
    lines = [
        f"The cheapest of {len(points)} settings that keeps {quality} is {best.setting}: "
        f"{best.quality[quality.name]:.4g} at {best.cost[cost]:.4g} {unit} ({best.images} images)."
    ]
    plain = [p for p in points if p.setting.config() is None and quality.missing(p.quality[quality.name]) <= 0]
    if plain:
        cheap = min(plain, key=lambda p: p.cost[cost])
        lines.append(
            f"The cheapest full-precision setting that keeps it, {cheap.setting}, costs {cheap.cost[cost]:.4g}: "
            f"{cheap.cost[cost] / best.cost[cost]:.2f} times as much."
        )
    return lines


def write_frontier(
    folder: Path, points: list[Point], quality: Quality, cost: CostName, about: dict[str, Any]
) -> dict[str, Any]:
    """Write ``frontier.json``, ``best.yaml`` and one recipe for each point of the frontier.

    Args:
        folder: The search's.
        points: Of :meth:`modiff.lit.search.study.Search.points`.
        quality: The bound.
        cost: What was minimized.
        about: Teacher, seed, reference, command and versions, for the record.

    Returns:
        What ``frontier.json`` holds.
    """
    front = pareto(points, quality, cost)
    best = cheapest(points, quality, cost)
    recipes = folder / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    for old in recipes.glob("*.yaml"):
        old.unlink()
    named = {}
    for number, point in enumerate(front, start=1):
        path = recipes / f"{number:02d}_{slug(point.setting)}.yaml"
        path.write_text(recipe_text(point, about, quality, cost, path))
        named[point.setting] = path
    if best is not None:
        path = folder / "best.yaml"
        path.write_text(recipe_text(best, about, quality, cost, path))
    result = {
        "quality": str(quality),
        "cost": cost,
        "cost_unit": COSTS[cost][1],
        "quality_label": QUALITIES[quality.name][0],
        "about": about,
        "best": None if best is None else best.to_dict(),
        "frontier": [
            {**point.to_dict(), "recipe": str(path.relative_to(folder)), "command": command(path)}
            for point, path in ((point, named[point.setting]) for point in front)
        ],
        "points": [point.to_dict() for point in points],
        "sentences": sentences(points, quality, cost),
    }
    (folder / "frontier.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def command(recipe: Path) -> str:
    """The command that draws with a recipe and measures it."""
    return f"modiff evaluate --config {recipe}"


def slug(setting: Setting) -> str:
    """A file name of a setting.

    >>> slug(Setting("ddim", 20, 8, 6))
    'ddim20_w8a6_modiff'
    """
    parts = [f"{setting.sampler}{setting.steps}", f"w{setting.weight_bits}a{setting.activation_bits}", setting.method]
    parts += [value for value in (setting.granularity, setting.scales) if value != "preset"]
    parts += [] if setting.schedule == "none" else [setting.schedule]
    parts += ["compiled"] if setting.compile else []
    return "_".join(parts)


def recipe_text(point: Point, about: dict[str, Any], quality: Quality, cost: CostName, path: Path) -> str:
    """A recipe as YAML, headed by what was measured."""
    measured = (
        f"# {point.setting}: {quality.name} {point.quality[quality.name]:.4g}, "
        f"{point.cost[cost]:.4g} {COSTS[cost][1]} ({point.images} images, seed {about.get('seed', 0)})\n"
        f"#   {command(path)}\n"
    )
    return measured + yaml.safe_dump(recipe_of(point.setting, about["teacher"]), sort_keys=False)
