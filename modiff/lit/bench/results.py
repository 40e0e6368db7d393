"""What ``modiff bench`` says: sentences, tables and the plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch
from rich import box
from rich.markup import escape
from rich.table import Table

from modiff.lit.report.plots import BLUE, GREY, ORANGE, figure_file, shorten
from modiff.lit.report.tables import markdown_cell
from modiff.lit.report.words import number
from modiff.student.swap import Row

COLUMNS = (
    "images",
    "mode",
    "denoiser",
    "ms per evaluation (quartiles)",
    "speed, x teacher (quartiles)",
    "products, ms",
    "modulation, ms",
    "rest, ms",
    "speed, x compiled teacher in bfloat16 (quartiles)",
    "first evaluation, ms",
    "to compile, s",
    "peak memory beyond weights, MiB",
    "state, MiB",
    "weights as stored, MiB",
)
SHORT = ("images", "mode", "denoiser", "ms", "speed, x", "products", "modulation", "rest")
STAGES = {
    "products_s": ("products", BLUE),
    "modulation_s": ("modulation: difference, range, quantize, update, accumulate", ORANGE),
    "rest_s": ("rest: norms, activations, attention", GREY),
}
NAMES = {"products_s": "the products", "modulation_s": "modulation", "rest_s": "the rest of the network"}


def backends(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Backend of each operator and why, as :func:`modiff.describe` says."""
    found = []
    for row in rows:
        backend, _, why = row.backend.partition(" (")
        entry = {"name": row.name, "type": row.type}
        if row.skipped is not None:
            found.append({**entry, "backend": "full precision", "why": row.skipped})
        else:
            found.append({**entry, "backend": backend, "why": why.removesuffix(")")})
    return found


def sentences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each student, mode and batch size: whether it is faster, and which stage decides."""
    return [sentence(name, entry, student) for entry in results for name, student in entry["students"].items()]


FLOAT = ("simulate", "full precision")


def unequal_arms(students: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A sentence where students run different shares of their operators in integers; no sentence where they do not.

    Args:
        students: The entries of :func:`backends` for each student.

    >>> unequal_arms({"a": [{"backend": "onednn"}], "b": [{"backend": "simulate"}]})
    ['UNEQUAL ARMS: a runs 1 of 1 operators in integers, b 0 of 1. Their speeds do not compare the methods.']
    """
    shares = {n: (sum(e["backend"] not in FLOAT for e in rows), len(rows)) for n, rows in students.items()}
    if len(set(shares.values())) < 2:
        return []
    first, *rest = shares.items()
    parts = [f"{first[0]} runs {first[1][0]} of {first[1][1]} operators in integers"]
    parts += [f"{name} {integers} of {whole}" for name, (integers, whole) in rest]
    return [f"UNEQUAL ARMS: {', '.join(parts)}. Their speeds do not compare the methods."]


def sentence(name: str, entry: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Say plainly whether a student is faster than the teacher, and which stage costs or saves the time.

    Within the quartiles of its ratio around 1, it is called as fast as the teacher.
    """
    ratio, teacher = student["ratio"], entry["teacher"]
    where = f"{entry['mode']}, {entry['batch_size']} image{'s' * (entry['batch_size'] != 1)} per evaluation"
    change = {key: 1000 * (student["stages"][key] - teacher["stages"][key]) for key in STAGES}
    parts = sorted((value, key) for key, value in change.items())
    more, less = _change(*parts[-1]), _change(*parts[0])
    speed = f"{number(ratio['median'], 3)} times the teacher's speed"
    if "ratio_to_bfloat16" in student:
        speed += f", {number(student['ratio_to_bfloat16']['median'], 3)} times that of the teacher in bfloat16"
    if ratio["q1"] <= 1 <= ratio["q3"]:
        return f"{name} is as fast as the teacher within the spread ({speed}; {where}): {more}; {less}."
    if ratio["median"] < 1:
        return f"{name} is SLOWER than the teacher ({speed}; {where}): {more}; {less}."
    return f"{name} is faster than the teacher ({speed}; {where}): {less}; {more}."


def _change(milliseconds: float, key: str) -> str:
    verb = "take" if key == "products_s" else "takes"
    return f"{NAMES[key]} {verb} {number(abs(milliseconds), 3)} ms {'more' if milliseconds > 0 else 'less'}"


def cells(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Text of every cell under :data:`COLUMNS`, the teacher first in each group."""
    rows = []
    for entry in results:
        for name, arm in (("teacher", entry["teacher"]), *entry["students"].items()):
            seconds, ratio = arm["seconds"], arm.get("ratio")
            ms = [number(1000 * seconds[key]) for key in ("median", "q1", "q3")]
            rows.append(
                [
                    str(entry["batch_size"]),
                    entry["mode"],
                    name,
                    f"{ms[0]} ({ms[1]} to {ms[2]})",
                    _speed(ratio) or "1",
                    *(number(1000 * arm["stages"][key], 3) for key in STAGES),
                    _speed(arm.get("ratio_to_bfloat16")) or "-",
                    number(1000 * arm["first_evaluation_s"], 3),
                    "-" if arm["compile_s"] is None else number(arm["compile_s"], 3),
                    number(arm["peak_memory_mib"], 3),
                    number(arm["state_mib"], 3),
                    number(arm["stored_weight_mib"], 3),
                ]
            )
    return rows


def _speed(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    middle, low, high = (number(ratio[key], 3) for key in ("median", "q1", "q3"))
    return f"{middle} ({low} to {high})"


def terminal_table(content: Mapping[str, Any]) -> Table:
    """The first columns without their quartiles, so that they fit a terminal of 80 characters."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=escape(f"{content['teacher']}: modiff bench"))
    for i, name in enumerate(SHORT):
        table.add_column(name, justify="left" if i in (1, 2) else "right", overflow="fold", no_wrap=i != 2)
    for row in cells(content["results"]):
        table.add_row(*(escape(text.split(" (")[0]) for text in row[: len(SHORT)]))
    return table


def markdown(content: Mapping[str, Any]) -> str:
    """The whole result as a Markdown page."""
    settings, source = content["settings"], content["provenance"]
    lines = [f"# modiff bench: {markdown_cell(content['teacher'])}", ""]
    lines += [f"- {markdown_cell(text)}" for text in content["summary"]]
    lines += ["", *_table([COLUMNS, *cells(content["results"])], left=(1, 2)), ""]
    lines += [
        "Medians and quartiles over all timed evaluations; the speed is the ratio teacher / student within each round, "
        "in which every denoiser has its turn. A first evaluation runs in full precision unless the warm-up is "
        "`refine`. The time to compile ends with the second evaluation, the first calls included, and starts without a "
        "cache; compiled stages serve all students of the process, so that only the first one waits for them. Peak "
        "memory is that of three evaluations of a new trajectory, the student's state included "
        f"({content['results'][0]['teacher']['peak_memory_is']}).",
        "",
    ]
    lines += ["Stages:", ""]
    for how, names in _stage_notes(content["results"]).items():
        lines.append(f"- {markdown_cell(', '.join(names))}: {how}.")
    lines.append("")
    lines += ["## Backends", ""]
    for name, facts in content["students"].items():
        for mode, rows in facts["executed"].items():
            counts = Counter((b["backend"], b["why"]) for b in rows)
            body = [(backend, str(count), why) for (backend, why), count in counts.most_common()]
            table = _table([("backend", "operators", "why"), *body], left=(0, 2))
            lines += [f"{markdown_cell(name)}, {mode}:", "", *table, ""]
    lines += ["## How it was measured", "", "```", content["command"], "```", ""]
    if content["compiler_problem"]:
        lines += [f"Nothing was compiled: {markdown_cell(content['compiler_problem'])}.", ""]
    facts = [(k, "not known" if v is None else str(v)) for k, v in {**settings, **source}.items()]
    return "\n".join([*lines, *_table([("setting", "value"), *facts], left=(0, 1))]) + "\n"


def _stage_notes(results: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in results:
        for name, arm in (("teacher", entry["teacher"]), *entry["students"].items()):
            names, label = found.setdefault(arm["stages"]["how"], []), f"{entry['mode']} {name}"
            names += [label] if label not in names else []
    return found


def _table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    rule = ["---" if i in left else "---:" for i in range(len(rows[0]))]
    body = [[markdown_cell(text) for text in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (body[0], rule, *body[1:])]


def bench_plot(content: Mapping[str, Any], path: Path) -> None:
    """Draw each evaluation as a bar of its stages, with quartiles of the whole and the ratio to the teacher.

    Args:
        content: Of ``bench.json``.
        path: PNG to write.
    """
    entries = content["results"]
    bars = sum(1 + len(entry["students"]) for entry in entries)
    with figure_file(path, 11.5, 1.5 + 0.42 * bars + 0.5 * len(entries)) as figure:
        figure.suptitle(f"{content['teacher']}: time of one evaluation", x=0.01, ha="left", fontweight="bold")
        heights = [1 + len(entry["students"]) for entry in entries]
        panels = figure.subplots(len(entries), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, entry in zip(panels, entries, strict=True):
            arms = [("teacher", entry["teacher"]), *entry["students"].items()]
            for i, (_, arm) in enumerate(arms):
                _bar(axes, i, arm)
            axes.set_yticks(range(len(arms)), [shorten(name, 34) for name, _ in arms])
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.margins(x=0.15)
            axes.tick_params(axis="y", length=0)
            axes.grid(True, axis="x")
            axes.set_title(f"batch {entry['batch_size']}, {entry['mode']}")
        panels[-1].set_xlabel("ms per evaluation; the line spans the quartiles")
        handles = [Patch(color=color, label=label) for label, color in STAGES.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _bar(axes: Any, place: int, arm: Mapping[str, Any]) -> None:
    parts = {key: max(0.0, 1000 * arm["stages"][key]) for key in STAGES}
    whole = 1000 * arm["seconds"]["median"]
    scale = whole / (sum(parts.values()) or 1.0)  # clocks make an evaluation longer; its shares are what is drawn
    left = 0.0
    for key, value in parts.items():
        axes.barh(place, value * scale, left=left, height=0.62, color=STAGES[key][1])
        left += value * scale
    low, high = (1000 * arm["seconds"][key] for key in ("q1", "q3"))
    axes.plot([low, high], [place, place], color="black", lw=1.2, marker="|", ms=6)
    ratio = arm.get("ratio")
    text = f"{number(whole, 3)} ms" + (f", {number(ratio['median'], 3)} x the teacher's speed" if ratio else "")
    axes.annotate(text, (max(whole, high), place), (6, 0), textcoords="offset points", va="center", size=8)
