"""The reports of ``modiff evaluate`` and ``modiff compare``: one page each, which needs neither network nor server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors.torch import load_file
from torch import Tensor

from modiff.errors import ConfigError
from modiff.lit.report.embedding import data_uri, is_lossless, psnr_of
from modiff.lit.report.error_view import error_view
from modiff.lit.report.rendering import Heading, TableView, picture, write_page
from modiff.lit.report.result import OperatorCost, Result
from modiff.lit.report.sentences import closest, headline
from modiff.lit.report.tables import (
    FULL_PRECISION,
    SAME,
    Cell,
    Rows,
    cells,
    columns,
    features_note,
    missing_figures,
    notes,
    numeric,
)
from modiff.lit.report.words import number, share
from modiff.metrics.figures import all_figures

SAMPLES = "samples.safetensors"
COMPARED_SAMPLES = 12
GBOP_NOTE = (
    "A GBOP is 1e9 bit operations (multiply-accumulates x weight bits x activation bits), the warm-up averaged in; "
    "products of two activations (attention) count at the precision they ran in. A fixed input, such as a prompt's, is "
    "multiplied once per trajectory. Weights are as stored, scales included; state is â and ô as allocated."
)


def write_report(folder: Path, *, recipe: str, result: Result, config_yaml: str, description: str) -> Path:
    """Write ``report.html`` of one recipe, atomically.

    Args:
        folder: Holds ``samples.safetensors``, ``cost.png`` and, where errors were measured, ``trajectory_errors.png``.
        recipe: Its name.
        result: What it gave.
        config_yaml: The whole configuration.
        description: The table of :func:`modiff.describe`.

    Returns:
        The page's path.

    Raises:
        ConfigError: A file is missing, or the errors along the trajectory do not belong together.
    """
    images = _images(folder)
    names = [name for name in ("teacher", "student") if name in images]
    context = {
        "kind": "modiff evaluate",
        "heading": recipe,
        "lead": headline(result),
        "stamp": stamp(recipe, result),
        "tiles": _tiles(result),
        "gallery_view": _gallery({name: images[name] for name in names}),
        "samples_note": f"First of {result.num_images} images, seed {result.seed}; both sides have the same noise.",
        "figures": _figures(result),
        "figures_note": _figures_note(result),
        "missing": [(figure.label, who, reason) for figure, who, reason in missing_figures(result)],
        "errors": error_view({recipe: result.errors}) if result.errors else None,
        "errors_picture": picture(folder / "trajectory_errors.png") if result.errors else None,
        "cost": _cost_totals(result),
        "cost_note": GBOP_NOTE,
        "cost_picture": picture(folder / "cost.png"),
        "operators": _operators(result),
        "description": description,
        "config_yaml": config_yaml,
        "provenance": _provenance(result),
    }
    return write_page(folder / "report.html", "evaluate.html", f"{recipe} - modiff", context)


def write_compare_report(
    folder: Path, rows: Rows, samples: Mapping[str, Tensor], reports: Mapping[str, Path] | None = None
) -> Path:
    """Write ``report.html`` of several recipes against the same teacher images, atomically.

    Args:
        folder: Holds ``compare.png``; the page goes there.
        rows: Recipes' names and results; the teacher's numbers are those of the first.
        samples: Images ``[N, C, H, W]`` in [0, 1] by name, the teacher's first; the first twelve are shown.
        reports: Each recipe's own page, linked relative to ``folder``; recipes that are not in it get no link.

    Returns:
        The page's path.

    Raises:
        ConfigError: There is no row, or a picture is missing.
    """
    table = _recipes(rows, reports or {}, folder)
    first = rows[0][1]
    curves = {name: result.errors for name, result in rows if result.errors}
    context = {
        "kind": "modiff compare",
        "heading": "Comparison of " + ("one recipe" if len(rows) == 1 else f"{len(rows)} recipes"),
        "lead": closest(rows),
        "stamp": stamp(_hashes(rows), first) | {"recipe_hash": None},
        "recipes": table,
        "recipes_note": f"{first.num_images} images from the same noise, seed {first.seed}; the row “{FULL_PRECISION}” "
        + "is the teacher that all recipes start from and are measured against.",
        "notes": notes(rows),
        "points": _points(rows),
        "picture": picture(folder / "compare.png"),
        "gallery_view": _gallery({name: images[:COMPARED_SAMPLES] for name, images in samples.items()}),
        "samples_note": "Every version of a sample starts from the same noise.",
        "errors": error_view(curves) if curves else None,
        "provenance": _provenances(rows),
    }
    return write_page(folder / "report.html", "compare.html", "Comparison - modiff", context)


def stamp(recipe: str, result: Result) -> dict[str, Any]:
    """Where the numbers of a section come from: recipe, its hash, seed, count and commit."""
    made = result.provenance
    return {
        "recipe": recipe,
        "recipe_hash": made.get("recipe_hash"),
        "seed": result.seed,
        "num_images": result.num_images,
        "git_commit": (made.get("git_commit") or "")[:12] or None,
    }


def _hashes(rows: Rows) -> str:
    """The recipes with their hashes, for the line below the sections of a comparison."""
    return ", ".join(f"{name} ({result.provenance.get('recipe_hash') or 'no hash'})" for name, result in rows)


def _images(folder: Path) -> dict[str, Tensor]:
    path = folder / SAMPLES
    if not path.is_file():
        raise ConfigError(f"The report needs {path}, which does not exist. Draw the samples before writing the report.")
    return load_file(str(path))


def _gallery(versions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every sample with all its versions; the first version is the teacher's."""
    teacher = next(iter(versions.values()))
    addresses = {name: [data_uri(image) for image in images] for name, images in versions.items()}
    noted = {name: [""] * len(images) for name, images in versions.items()}
    for name, images in versions.items():
        if images is not teacher:
            noted[name] = [_likeness(psnr) for psnr in psnr_of(images, teacher[: len(images)])]
    samples = [
        [{"name": name, "src": addresses[name][i], "note": noted[name][i]} for name in versions]
        for i in range(min(map(len, versions.values())))
    ]
    return {
        "names": list(versions),
        "samples": samples,
        "lossless": is_lossless(teacher),
        "size": list(teacher.shape[-2:]),
    }


def _likeness(psnr: float | None) -> str:
    return "identical to the teacher's" if psnr is None else f"PSNR {number(psnr)} dB"


def _tiles(result: Result) -> list[tuple[str, str]]:
    """Headline numbers, each with what it is."""
    evaluations, cost = result.evaluations, result.cost
    assert evaluations is not None
    assert cost is not None
    by_name = {figure.name: figure for figure in all_figures()}
    found = []
    for name in ("psnr_db", "fid_to_teacher"):
        figure, value = by_name[name], result.value(f"student.{name}")
        network = result.network(figure)
        text = figure.label + (f", in the features of {network}" if network else "")
        if value is None:
            found.append(("not available", f"{text}: {result.reason(f'student.{name}')}"))
        else:
            unit = f" {figure.unit}" if figure.unit else ""
            found.append((number(value, figure.digits) + unit, f"{text}; {figure.better} is better"))
    return [
        *found,
        (f"{evaluations['quantized']} / {evaluations['total']}", "evaluations with quantized activations"),
        (
            share(cost["gbops_per_evaluation"], cost["teacher_gbops_per_evaluation"]),
            "the teacher's bit operations in each evaluation",
        ),
    ]


def _figures(result: Result) -> TableView:
    """Every figure that student or teacher has, and the times."""
    rows = []
    for figure in all_figures():
        student, teacher = (result.value(f"{who}.{figure.name}") for who in ("student", "teacher"))
        if student is None and teacher is None:
            continue
        other = numeric(teacher, figure.digits) if "teacher" in figure.of else Cell(SAME)
        better = f"{figure.better} is better" if figure.better else ""
        network = result.network(figure) or ""
        rows.append([Cell(figure.title), numeric(student, figure.digits), other, Cell(better), Cell(network)])
    seconds = result.timing["seconds_per_image_evaluation"]
    if seconds:
        times = [numeric(1000 * seconds[who], 3) for who in ("student", "teacher")]
        ratio = f"{number(result.timing['time_ratio'], 3)} x the teacher's"
        rows.append([Cell("Time per image and evaluation, ms"), *times, Cell(ratio), Cell("")])
    headings = [
        Heading("figure"),
        Heading("student", numeric=True),
        Heading("teacher", numeric=True),
        Heading(""),
        Heading("measured with"),
    ]
    return TableView("Metrics of the student's images", headings, rows)


def _figures_note(result: Result) -> str:
    seconds = "" if result.seconds is None else f", {number(result.seconds, 3)} s in all"
    return (
        f"{result.num_images} images, seed {result.seed}{seconds}. {features_note(result)} Bit operations are counted, "
        "not timed: where low-bit products are simulated, quantizing costs time."
    )


def _cost_totals(result: Result) -> TableView:
    cost = result.cost
    assert cost is not None
    rows = [
        [
            Cell("GBOPs per image and evaluation"),
            numeric(cost["gbops_per_evaluation"]),
            numeric(cost["teacher_gbops_per_evaluation"]),
        ],
        [
            Cell("the same at the bits of containers"),
            numeric(cost.get("container_gbops_per_evaluation", cost["gbops_per_evaluation"])),
            numeric(cost["teacher_gbops_per_evaluation"]),
        ],
        [Cell("Weights, MiB"), numeric(cost["weight_mib"]), numeric(cost["teacher_weight_mib"])],
        [Cell("State per image, MiB"), numeric(cost["state_mib_per_image"]), numeric(0.0)],
    ]
    headings = [Heading(""), Heading("student", numeric=True), Heading("teacher", numeric=True)]
    return TableView("Cost of student and teacher", headings, rows, sortable=False)


def _operators(result: Result) -> TableView:
    cost = result.cost
    assert cost is not None
    total = cost["gbops_per_evaluation"] or 1.0
    rows = [_operator(row, total) for row in sorted(result.operators, key=lambda row: -row["gbops"])]
    outside = cost["other_gbops_per_evaluation"]
    rows.append(
        [
            Cell("outside: attention, norms, embeddings"),
            Cell("", 0.0),
            Cell("", 64.0),
            numeric(outside),
            Cell(f"{outside / total:.1%}", outside / total),
            numeric(cost["other_weight_mib"]),
            Cell("0", 0.0),
        ]
    )
    titles = ("MACs, millions", "bits W/A", "GBOPs", "of all", "weights, MiB", "state, MiB")
    headings = [Heading("operator"), *(Heading(title, numeric=True) for title in titles)]
    return TableView("Cost of each operator", headings, rows, tall=True, bars=4)


def _operator(row: OperatorCost, total: float) -> list[Cell]:
    weight, activation = row["weight_bits"], row["activation_bits"]
    return [
        Cell(row["name"] + " (fixed input: once)" * row["constant"]),
        numeric(row["macs"] / 1e6),
        Cell(f"{weight}/{activation}", weight + activation / 100),
        numeric(row["gbops"]),
        Cell(f"{row['gbops'] / total:.1%}", row["gbops"] / total),
        numeric(row["weight_mib"]),
        numeric(row["state_mib"]),
    ]


def _provenance(result: Result) -> TableView:
    rows = [[Cell(key), _recorded(result, key)] for key in sorted(result.provenance)]
    return TableView("Where the numbers come from", [Heading(""), Heading("value")], rows, sortable=False)


def _recorded(result: Result, key: str) -> Cell:
    value = result.provenance.get(key)
    return Cell("not recorded" if value is None else str(value))


def _provenances(rows: Rows) -> TableView:
    """The recipes' provenance side by side, facts that all share included."""
    keys = sorted({key for _, result in rows for key in result.provenance})
    body = [[Cell(key), *(_recorded(result, key) for _, result in rows)] for key in keys]
    headings = [Heading(""), *(Heading(name) for name, _ in rows)]
    return TableView("Where the numbers of each recipe come from", headings, body, sortable=False)


def _recipes(rows: Rows, reports: Mapping[str, Path], folder: Path) -> TableView:
    body = cells(rows)
    kinds = columns()
    table = [[*body[0], Cell(""), Cell("")]]
    for row, (name, result) in zip(body[1:], rows, strict=True):
        link = _relative(reports[name], folder) if name in reports else None
        made = result.provenance
        extra = [Cell(str(result.seed), float(result.seed)), Cell(str(made.get("recipe_hash") or "not recorded"))]
        table.append([Cell(row[0].text, link=link), *row[1:], *extra])
    headings = [
        Heading("recipe"),
        *(Heading(column.title, numeric=True, better=column.better) for column in kinds),
        Heading("seed", numeric=True),
        Heading("recipe hash"),
    ]
    return TableView("Recipes against their teacher", headings, table, best=_best(body, kinds))


def _best(body: Sequence[Sequence[Cell]], kinds: Sequence[Any]) -> set[tuple[int, int]]:
    """Row and column of the best value among the students, where there is a choice."""
    found = set()
    for j, column in enumerate(kinds, start=1):
        known = [(row[j].value, i) for i, row in enumerate(body) if i and row[j].value is not None]
        if column.better and len({value for value, _ in known}) > 1:
            best = (max if column.better == "higher" else min)(value for value, _ in known)
            found |= {(i, j) for value, i in known if value == best}
    return found


def _points(rows: Rows) -> dict[str, Any]:
    """Every numeric column of every recipe, for the scatter plot."""
    kinds, body = columns(), cells(rows)
    return {
        "axes": [column.title for column in kinds],
        "better": [column.better for column in kinds],
        "points": [
            {"name": row[0].text, "values": [cell.value for cell in row[1:]], "texts": [str(cell) for cell in row[1:]]}
            for row in body
        ],
    }


def _relative(page: Path, folder: Path) -> str:
    return "./" + quote(Path(os.path.relpath(page, folder)).as_posix())
