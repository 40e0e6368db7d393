"""The reports of ``modiff evaluate`` and ``modiff compare``: one self-contained page each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modiff.lit.page import Html, element, folded, link, picture, section, table, tiles, write_page
from modiff.lit.plots import error_matrix, worst_operators
from modiff.lit.tables import (
    FULL_PRECISION,
    HEADERS,
    Rows,
    cells,
    features_note,
    markdown_table,
    metrics_table,
    missing_reasons,
    notes,
    number,
)

__all__ = ["describe_errors", "markdown_table", "metrics_table", "write_compare_report", "write_report"]

LIKENESS = (
    (40.0, "hard to tell from the teacher's"),
    (30.0, "close to the teacher's, with small differences"),
    (20.0, "recognizably the teacher's, with visible differences"),
    (float("-inf"), "far from the teacher's"),
)
COST_ROWS = 10


def write_report(
    folder: Path,
    *,
    recipe: str,
    metrics: Mapping[str, Any],
    errors: Mapping[str, Any],
    cost_rows: Sequence[Mapping[str, Any]],
    config_yaml: str,
    description: str,
) -> Path:
    """Write ``report.html`` of one recipe, atomically.

    Args:
        folder: Holds ``samples.png``, ``trajectory_errors.png`` and ``cost.png``, which the page embeds.
        recipe: Its name.
        metrics: As in ``metrics.json``.
        errors: As for :func:`modiff.lit.plots.trajectory_errors_plot`.
        cost_rows: One for each operator: ``name``, ``macs``, ``weight_bits``, ``activation_bits``, ``gbops`` per image
            and evaluation, ``state_mib`` per image.
        config_yaml: The whole configuration.
        description: The table of :func:`modiff.describe`.

    Returns:
        The page's path.

    Raises:
        ConfigError: A picture is missing, or ``errors`` does not belong together.
    """
    count = metrics["num_images"]
    return write_page(
        folder / "report.html",
        f"{recipe} - modiff",
        [
            element("p", "modiff evaluate", class_="kind"),
            element("h1", recipe),
            element("p", headline(metrics), class_="lead"),
            tiles(_headline_tiles(metrics)),
            section(
                "Samples",
                picture(
                    folder / "samples.png",
                    f"Teacher above student, from the same noise (first of {count} images, seed {metrics['seed']}).",
                    pixels=True,
                ),
            ),
            section("Metrics", _metrics(metrics)),
            section(
                "Where the error comes from",
                *(element("p", text) for text in describe_errors(errors)),
                picture(
                    folder / "trajectory_errors.png",
                    "Relative L2 difference between student and teacher: of x_t and of each operator's output, at each "
                    "evaluation of its own trajectory, so errors made earlier are included.",
                ),
            ),
            section("Cost", *_cost(metrics, cost_rows, folder)),
            section(
                "How it was made",
                folded("Operators: bits, granularity, and the rule that matched", element("pre", description)),
                folded("Configuration", element("pre", config_yaml)),
                folded("Provenance", _provenance(metrics)),
            ),
        ],
    )


def headline(metrics: Mapping[str, Any]) -> str:
    """What the numbers mean, in one plain sentence."""
    student, evaluations, cost = metrics["student"], metrics["evaluations"], metrics["cost"]
    psnr = student["psnr_db"]
    if psnr is not None:
        likeness = next(text for limit, text in LIKENESS if psnr >= limit or limit == LIKENESS[-1][0])
        result = f"The student's images are {likeness} (PSNR {number(psnr)} dB)"
    elif student["relative_l2"] == 0:
        result = "The student's images are identical to the teacher's"
    else:
        result = f"The student's images differ from the teacher's by {_percent(student['relative_l2'])} (relative L2)"
    quantized, total = evaluations["quantized"], evaluations["total"]
    ratio = _ratio(cost["teacher_gbops_per_evaluation"], cost["gbops_per_evaluation"])
    if quantized == 0:
        how = f"none of the {total} denoiser evaluations quantized its activations"
    elif quantized == total:
        how = f"all {total} denoiser evaluations ran on quantized activations"
    else:
        how = f"{quantized} of {total} denoiser evaluations ran on quantized activations"
    return f"{result}; {how}, and an evaluation takes {ratio} bit operations of the teacher's."


def describe_errors(errors: Mapping[str, Any]) -> list[str]:
    """Say in words how the error grows, in which operators and at which timesteps it is largest."""
    matrix, steps = error_matrix(errors), list(errors["timesteps"])
    worst = worst_operators(errors, 5)
    if not steps:
        return ["No evaluation was recorded."]
    first, last, texts = errors["sample_error"][0], errors["sample_error"][-1], []
    peak = int(np.argmax(np.nan_to_num(np.array(errors["sample_error"], dtype=np.float64), nan=-1.0)))
    texts.append(
        f"x_t is {_percent(first)} away from the teacher's at the first evaluation (t = {steps[0]}) and "
        f"{_percent(last)} at the last (t = {steps[-1]}); it is furthest away at t = {steps[peak]} "
        f"({_percent(errors['sample_error'][peak])})."
    )
    if not worst:
        return [*texts, "No operator's output differed from the teacher's."]
    names = ", ".join(f"{name} ({_percent(value)})" for name, value in worst)
    texts.append(f"Operators with the largest error, mean over the evaluations: {names}.")
    medians = [(float(np.median(c[~np.isnan(c)])), t) for c, t in zip(matrix.T, steps, strict=True) if np.any(c > 0)]
    ranked = sorted(medians, key=lambda pair: -pair[0])[:3]
    hardest = ", ".join(f"t = {t} ({_percent(value)})" for value, t in ranked)
    return [*texts, f"Evaluations with the largest error, median over the operators: {hardest}."]


def write_compare_report(
    folder: Path, rows: Rows, samples: Path, reports: Mapping[str, Path] | None = None, title: str = "Comparison"
) -> Path:
    """Write ``report.html`` of several recipes against the same teacher images, atomically.

    Args:
        folder: Holds ``compare.png``; the page goes there.
        rows: Recipe names and their metrics (``metrics.json``); the teacher's numbers are those of the first.
        samples: Picture with the teacher's images in the first row, then one row for each recipe.
        reports: Each recipe's own page, linked relative to ``folder``; recipes that are not in it get no link.
        title: Heading.

    Returns:
        The page's path.

    Raises:
        ConfigError: There is no row, or a picture is missing.
    """
    body = cells(rows, "not available")
    count, seed = rows[0][1]["num_images"], rows[0][1]["seed"]
    linked = [[_linked(row[0], reports or {}, folder) if i else row[0], *row[1:]] for i, row in enumerate(body)]
    return write_page(
        folder / "report.html",
        f"{title} - modiff",
        [
            element("p", "modiff compare", class_="kind"),
            element("h1", title),
            element("p", _best(rows), class_="lead"),
            section(
                "Recipes",
                table([head for head, _ in HEADERS], linked, range(1, len(HEADERS))),
                element(
                    "p",
                    f"{count} images from the same noise (seed {seed}); the row “{FULL_PRECISION}” is the teacher that "
                    "all recipes start from and are measured against.",
                    class_="soft",
                ),
                *(element("p", note, class_="soft") for note in notes(rows)),
            ),
            section("Quality", picture(folder / "compare.png", "Quality of each recipe; values beside the bars.")),
            section(
                "Samples",
                picture(samples, "The same noise in every column: the teacher, then each recipe.", pixels=True),
            ),
            section("Provenance", folded("Of the first recipe's run", _provenance(rows[0][1]))),
        ],
    )


def _best(rows: Rows) -> str:
    known = [(m["student"]["psnr_db"], name) for name, m in rows if m["student"]["psnr_db"] is not None]
    if not known:
        return "No recipe has a PSNR to compare by; the notes below the table say why."
    (high, best), (low, last) = max(known), min(known)
    if len(known) == 1 or high == low:
        return f"{best} reaches a PSNR of {number(high)} dB to the teacher's images."
    return (
        f"Closest to the teacher's images is {best} (PSNR {number(high)} dB), furthest away {last} ({number(low)} dB)"
        + ("; recipes without a PSNR are left out." if len(known) < len(rows) else ".")
    )


def _linked(name: str, reports: Mapping[str, Path], folder: Path) -> Html | str:
    if name not in reports:
        return name
    return link(name, Path(os.path.relpath(reports[name], folder)))


def _headline_tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    student, cost, evaluations = metrics["student"], metrics["cost"], metrics["evaluations"]
    features, missing = metrics["features"], missing_reasons(metrics)
    distance = f"Fréchet distance to the teacher's images in the features of {features['network']}; 0 is equal"

    def entry(key: str, value: float | None, unit: str, text: str) -> tuple[str, str]:
        if value is None:
            return "not available", f"{text}: {missing[key]}"
        return number(value) + unit, text

    ratio = _ratio(cost["teacher_gbops_per_evaluation"], cost["gbops_per_evaluation"])
    return [
        entry("student.psnr_db", student["psnr_db"], " dB", "PSNR to the teacher's images; higher is better"),
        entry("student.fid_to_teacher", student["fid_to_teacher"], "", distance),
        (f"{evaluations['quantized']} / {evaluations['total']}", "evaluations with quantized activations"),
        (ratio, "bit operations per evaluation, against the teacher"),
    ]


def _metrics(metrics: Mapping[str, Any]) -> Html:
    student, teacher, seconds = metrics["student"], metrics["teacher"], metrics["seconds_per_image_evaluation"]
    missing = missing_reasons(metrics)

    def text(key: str, value: float | None, unit: str = "") -> str:
        return f"not available: {missing[key]}" if value is None else number(value) + unit

    rows = [
        ("PSNR to the teacher's images", text("student.psnr_db", student["psnr_db"], " dB"), "reference"),
        ("Relative L2 difference to the teacher's images", number(student["relative_l2"]), "reference"),
        (
            "Fréchet distance to the teacher's images",
            text("student.fid_to_teacher", student["fid_to_teacher"]),
            "reference",
        ),
        (
            "Fréchet distance to real images",
            text("student.fid", student["fid"]),
            text("teacher.fid", teacher["fid"]),
        ),
        (
            "Time per image and evaluation",
            f"{_ms(seconds['student'])} ({number(metrics['time_ratio'], 3)} x)",
            _ms(seconds["teacher"]),
        ),
    ]
    note = (
        f"{metrics['num_images']} images, seed {metrics['seed']}, {number(metrics['seconds'], 3)} s in all. "
        + features_note(metrics)
        + " Bit operations are counted, not timed: where low-bit products are simulated, quantizing costs time."
    )
    return Html(table(["", "student", "teacher"], rows) + element("p", note, class_="soft"))


def _cost(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Html]:
    cost = metrics["cost"]
    totals = [
        (
            "GBOPs per image and evaluation",
            number(cost["gbops_per_evaluation"]),
            number(cost["teacher_gbops_per_evaluation"]),
        ),
        ("Weights, MiB", number(cost["weight_mib"]), number(cost["teacher_weight_mib"])),
        ("State per image, MiB", number(cost["state_mib_per_image"]), "0"),
    ]
    note = (
        "A GBOP is 1e9 bit operations (multiply-accumulates x weight bits x activation bits), the warm-up averaged in; "
        "the totals include products of two activations (attention), the operators' rows do not."
    )
    headers = ["operator", "MACs, millions", "bits W/A", "GBOPs", "state, MiB"]
    ranked = [
        (
            row["name"],
            number(row["macs"] / 1e6),
            f"{row['weight_bits']}/{row['activation_bits']}",
            number(row["gbops"]),
            number(row["state_mib"]),
        )
        for row in sorted(rows, key=lambda row: -row["gbops"])
    ]
    parts = [
        table(["", "student", "teacher"], totals, (1, 2)),
        element("p", note, class_="soft"),
        picture(folder / "cost.png", "The operators that cost most."),
        table(headers, ranked[:COST_ROWS], range(1, 5)),
    ]
    if len(ranked) > COST_ROWS:
        parts.append(
            folded(f"The other {len(ranked) - COST_ROWS} operators", table(headers, ranked[COST_ROWS:], range(1, 5)))
        )
    return parts


def _provenance(metrics: Mapping[str, Any]) -> Html:
    return table(
        ["", "value"], [(k, "not recorded" if v is None else v) for k, v in sorted(metrics["provenance"].items())]
    )


def _percent(value: float | None) -> str:
    return "an unknown amount" if value is None else f"{number(100 * value, 3)} %"


def _ms(seconds: float | None) -> str:
    return "not available" if seconds is None else f"{number(1000 * seconds, 3)} ms"


def _ratio(teacher: float, student: float) -> str:
    """How many times fewer, as 1/x: what "4.0x fewer" means is read in two ways."""
    return (
        "none"
        if student == 0
        else f"1/{number(teacher / student, 3)}"
        if teacher > student
        else f"{number(student / teacher, 3)} x"
    )
