"""The reports of ``modiff evaluate`` and ``modiff compare``: one self-contained page each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modiff.lit.report.page import Html, element, folded, link, picture, section, table, tiles, write_page
from modiff.lit.report.sentences import closest, describe_errors, headline, share
from modiff.lit.report.tables import (
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

__all__ = ["markdown_table", "metrics_table", "write_compare_report", "write_report"]

COST_ROWS = 10


def write_report(
    folder: Path,
    *,
    recipe: str,
    metrics: Mapping[str, Any],
    errors: Mapping[str, Any] | None,
    cost_rows: Sequence[Mapping[str, Any]],
    config_yaml: str,
    description: str,
) -> Path:
    """Write ``report.html`` of one recipe, atomically.

    Args:
        folder: Holds ``samples.png``, ``trajectory_errors.png`` and ``cost.png``, which the page embeds.
        recipe: Its name.
        metrics: As in ``metrics.json``.
        errors: As for :func:`modiff.lit.report.plots.trajectory_errors_plot`; None: not measured.
        cost_rows: One for each operator: ``name``, ``macs``, ``weight_bits``, ``activation_bits``, ``gbops`` per image
            and evaluation, ``constant``, ``weight_mib``, ``state_mib`` per image.
        config_yaml: The whole configuration.
        description: The table of :func:`modiff.describe`.

    Returns:
        The page's path.

    Raises:
        ConfigError: A picture is missing, or ``errors`` does not belong together.
    """
    return write_page(
        folder / "report.html",
        f"{recipe} - modiff",
        [
            element("p", "modiff evaluate", class_="kind"),
            element("h1", recipe),
            element("p", headline(metrics), class_="lead"),
            tiles(_headline_tiles(metrics)),
            _samples(metrics, folder),
            section("Metrics", _metrics(metrics)),
            _error_section(errors, folder),
            section("Cost", *_cost(metrics, cost_rows, folder)),
            section(
                "How it was made",
                folded("Operators: bits, granularity, and the rule that matched", element("pre", description)),
                folded("Configuration", element("pre", config_yaml)),
                folded("Provenance", _provenance(metrics)),
            ),
        ],
    )


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
            element("p", closest(rows), class_="lead"),
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


def _samples(metrics: Mapping[str, Any], folder: Path) -> Html:
    count, seed = metrics["num_images"], metrics["seed"]
    text = f"Teacher above student, from the same noise (first of {count} images, seed {seed})."
    return section("Samples", picture(folder / "samples.png", text, pixels=True))


def _error_section(errors: Mapping[str, Any] | None, folder: Path) -> Html:
    title = "Where the error comes from"
    if errors is None:
        return section(title, element("p", "Not measured: --error_images was 0."))
    text = (
        "Relative L2 difference between student and teacher: of x_t and of each operator's output, at each "
        "evaluation of its own trajectory, so errors made earlier are included."
    )
    words = (element("p", sentence) for sentence in describe_errors(errors))
    return section(title, *words, picture(folder / "trajectory_errors.png", text))


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

    bit_operations = share(cost["gbops_per_evaluation"], cost["teacher_gbops_per_evaluation"])
    return [
        entry("student.psnr_db", student["psnr_db"], " dB", "PSNR to the teacher's images; higher is better"),
        entry("student.fid_to_teacher", student["fid_to_teacher"], "", distance),
        (f"{evaluations['quantized']} / {evaluations['total']}", "evaluations with quantized activations"),
        (bit_operations, "the teacher's bit operations in each evaluation"),
    ]


def _metrics(metrics: Mapping[str, Any]) -> Html:
    student, teacher, seconds = metrics["student"], metrics["teacher"], metrics["seconds_per_image_evaluation"] or {}
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
        *_similarity(metrics),
        (
            "Time per image and evaluation",
            f"{_ms(seconds['student'])} ({number(metrics['time_ratio'], 3)} x)" if seconds else _ms(None),
            _ms(seconds.get("teacher")),
        ),
    ]
    note = (
        f"{metrics['num_images']} images, seed {metrics['seed']}, {number(metrics['seconds'], 3)} s in all. "
        + features_note(metrics)
        + " Bit operations are counted, not timed: where low-bit products are simulated, quantizing costs time."
    )
    return Html(table(["", "student", "teacher"], rows) + element("p", note, class_="soft"))


def _similarity(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured besides; ``reasons`` in metrics.json says why a row is missing."""
    student, teacher, features = metrics["student"], metrics["teacher"], metrics["features"]
    rows = []
    if "ssim" in student:
        rows.append(("SSIM to the teacher's images", number(student["ssim"]), "reference"))
    if "lpips" in student:
        rows.append((f"LPIPS to the teacher's images ({features['lpips']})", number(student["lpips"]), "reference"))
    if "clip_score" in student:
        scores = number(student["clip_score"]), number(teacher["clip_score"])
        rows.append((f"CLIP score, 0 to 100 ({features['clip']})", *scores))
    return rows


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
        "products of two activations (attention) count at the precision they ran in. A fixed input, such as a "
        "prompt's, is multiplied once per trajectory. Weights are as stored, scales included; state is â and ô as "
        "allocated."
    )
    headers = ["operator", "MACs, millions", "bits W/A", "GBOPs", "of all", "weights, MiB", "state, MiB"]
    total = cost["gbops_per_evaluation"] or 1.0
    ranked = [_cost_row(row, total) for row in sorted(rows, key=lambda row: -row["gbops"])]
    outside = ("outside: attention, norms, embeddings", "", "", number(cost["other_gbops_per_evaluation"]))
    outside += (f"{cost['other_gbops_per_evaluation'] / total:.1%}", number(cost["other_weight_mib"]), "0")
    parts = [
        table(["", "student", "teacher"], totals, (1, 2)),
        element("p", note, class_="soft"),
        picture(folder / "cost.png", "The operators that cost most."),
        table(headers, [*ranked[:COST_ROWS], outside], range(1, 7)),
    ]
    if len(ranked) > COST_ROWS:
        parts.append(
            folded(f"The other {len(ranked) - COST_ROWS} operators", table(headers, ranked[COST_ROWS:], range(1, 7)))
        )
    return parts


def _cost_row(row: Mapping[str, Any], total: float) -> tuple[str, ...]:
    return (
        row["name"] + " (fixed input: once)" * row["constant"],
        number(row["macs"] / 1e6),
        f"{row['weight_bits']}/{row['activation_bits']}",
        number(row["gbops"]),
        f"{row['gbops'] / total:.1%}",
        number(row["weight_mib"]),
        number(row["state_mib"]),
    )


def _provenance(metrics: Mapping[str, Any]) -> Html:
    return table(
        ["", "value"], [(k, "not recorded" if v is None else v) for k, v in sorted(metrics["provenance"].items())]
    )


def _ms(seconds: float | None) -> str:
    return "not available" if seconds is None else f"{number(1000 * seconds, 3)} ms"
