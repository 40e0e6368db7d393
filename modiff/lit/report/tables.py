"""Tables of recipes: for the terminal, for Markdown, and as cells for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from modiff.errors import ConfigError

Rows = Sequence[tuple[str, Mapping[str, Any]]]
FULL_PRECISION = "full precision"
SAME = "–"  # of the teacher against itself: there is nothing to measure
HEADERS = (  # in full, and stacked so that ten columns fit a terminal of 80
    ("recipe", "recipe"),
    ("PSNR to teacher, dB", "PSNR\ndB"),
    ("Fréchet distance to teacher's images", "Fréchet\nto\nteacher"),
    ("Fréchet distance to real images", "Fréchet\nto\nreal"),
    ("relative L2 to teacher", "rel.\nL2"),
    ("GBOPs per evaluation", "GBOPs\nper\neval."),
    ("weights, MiB", "weights\nMiB"),
    ("state, MiB per image", "state\nMiB/\nimage"),
    ("time, x teacher", "time\nx"),
    ("quantized / all evaluations", "quant.\n/ all"),
)


def number(value: float | None, digits: int = 4, missing: str = "n/a") -> str:
    """A number with ``digits`` significant digits.

    >>> number(40.7149), number(3.2), number(0.01234567, 3), number(123456.7), number(0.0), number(None)
    ('40.71', '3.200', '0.0123', '123457', '0', 'n/a')
    """
    if value is None:
        return missing
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0f}" if value == 0 or abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def cells(rows: Rows, missing: str = "n/a") -> list[list[str]]:
    """Text of every cell under :data:`HEADERS`: full precision first, then one row for each recipe.

    Args:
        rows: Recipe names and their metrics (``metrics.json``), all against the same teacher images.
        missing: Stands where a metric is null.

    Raises:
        ConfigError: There is no row.
    """
    if not rows:
        raise ConfigError("There are no recipes to tabulate; give at least one (name, metrics).")
    first = rows[0][1]
    cost, real = first["cost"], number(first["teacher"]["fid"], missing=missing)
    gbops, weights = number(cost["teacher_gbops_per_evaluation"]), number(cost["teacher_weight_mib"])
    total = f"0/{first['evaluations']['total']}"
    table = [[FULL_PRECISION, SAME, SAME, real, SAME, gbops, weights, "0", "1.00", total]]
    for name, metrics in rows:
        student, cost, evaluations = metrics["student"], metrics["cost"], metrics["evaluations"]
        table.append(
            [
                name,
                number(student["psnr_db"], missing=missing),
                number(student["fid_to_teacher"], missing=missing),
                number(student["fid"], missing=missing),
                number(student["relative_l2"], 3),
                number(cost["gbops_per_evaluation"]),
                number(cost["weight_mib"]),
                number(cost["state_mib_per_image"]),
                number(metrics["time_ratio"], 3, missing),
                f"{evaluations['quantized']}/{evaluations['total']}",
            ]
        )
    return table


def features_note(metrics: Mapping[str, Any]) -> str:
    """Say what a Fréchet distance was measured with; without it the number means nothing."""
    features = metrics["features"]
    if features["network"] is None:
        return "There was no feature network, so there is no Fréchet distance; give one with --model.features."
    return (
        f"Fréchet distances are between the {features['num_features']} features that {features['network']} gives for "
        f"{features['num_images']} images; they compare with no distance of another network or count."
    )


def missing_reasons(metrics: Mapping[str, Any]) -> dict[str, str]:
    """For each metric that is null, by its dotted key: why it is not available."""
    student, features = metrics["student"], metrics["features"]
    count, size = features["num_images"], features["num_features"]
    if size is None:
        few = "there is no feature network; give one: --model.features FILE"
        count, size = 0, 1
    else:
        few = f"it needs at least {2 * size} images (twice the {size} features of {features['network']}), not {count}"
    reasons = {}
    if student["psnr_db"] is None:
        reasons["student.psnr_db"] = (
            "the student's images are identical to the teacher's, so their PSNR is infinite"
            if student["relative_l2"] == 0
            else "an image identical to the teacher's has an infinite PSNR"
        )
    if student["fid_to_teacher"] is None:
        reasons["student.fid_to_teacher"] = few if count < 2 * size else "it was not computed"
    for key, value in (("teacher.fid", metrics["teacher"]["fid"]), ("student.fid", student["fid"])):
        if value is None:
            unknown = f"no statistics of real images under {features['network']} were given"
            reasons[key] = few if count < 2 * size else unknown
    return reasons


def notes(rows: Rows) -> list[str]:
    """What a reader of the table must know: the feature network, and why cells are empty."""
    texts = [features_note(rows[0][1])]
    labels = {"student.psnr_db": "PSNR", "student.fid_to_teacher": "Fréchet distance to the teacher's images"}
    seen: dict[str, list[str]] = {}
    for name, metrics in rows:
        for key, reason in missing_reasons(metrics).items():
            label = labels.get(key, "Fréchet distance to real images")
            who = FULL_PRECISION if key == "teacher.fid" else name
            names = seen.setdefault(f"{label} not available ({{}}): {reason}.", [])
            names += [who] if who not in names else []
    return texts + [text.replace("({})", f"({', '.join(names)})", 1) for text, names in seen.items()]


def metrics_table(rows: Rows) -> Table:
    """The comparison as a table for the terminal; arguments and errors as in :func:`cells`."""
    body = cells(rows)
    table = Table(box=box.SIMPLE_HEAD, padding=0, caption=escape("\n".join(notes(rows))), caption_justify="left")
    for i, (_, title) in enumerate(HEADERS):  # only the names are broken where the terminal is narrow: never a number
        widest = max(len(text) for text in [*title.split("\n"), *(row[i] for row in body)])
        table.add_column(
            title, justify="right" if i else "left", overflow="fold", min_width=widest if i else 11, no_wrap=bool(i)
        )
    for row in body:
        table.add_row(*(escape(text) for text in row))
    return table


def markdown_table(rows: Rows) -> str:
    """The comparison as a Markdown table with its notes below; arguments and errors as in :func:`cells`."""
    lines = [[head for head, _ in HEADERS], ["---"] + ["---:"] * (len(HEADERS) - 1)]
    lines += [[markdown_cell(text) for text in row] for row in cells(rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(markdown_cell(note) for note in notes(rows)) + "\n"


def markdown_cell(text: str) -> str:
    """Escape what would end a cell, start markup or let HTML through."""
    for mark in "\\`*[]|<":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
