"""The Markdown of the CIFAR-10 comparison: our figures beside the paper's, what agrees, what is open."""

from __future__ import annotations

import statistics
from typing import Any

from cifar10_table import ARMS, BITS, OTHER_GRANULARITIES, REFRESH, WEIGHTS

TITLES = {"ptq": "plain", "modiff": "modulated", "modiff_no_compensation": "modulated, no compensation"}
OPEN = "open"
RATIO = 2.0
"""Two distances this far apart, as a ratio, count as an order worth comparing with the paper's."""

HEAD = """# CIFAR-10: the paper's table, measured

    modiff statistics --features $FEATURES --data.path $DATA --data.channels 3 --output $REFERENCE
    python benchmarks/cifar10.py --features $FEATURES --reference $REFERENCE

DDIM with quadratic steps, x_0 not clipped. Weights have a scale for each output channel; at W8 they are rounded to
nearest, at W4 found by GPTQ on the student's own trajectories (32 images of noise). Every Linear and Conv is quantized,
and their weights found, in all arms alike. Small teacher: 5.6M parameters, `recipes/cifar10/teacher_small.yaml`, 2,048
images, three seeds; large one: the paper's 35.7M network, `recipes/cifar10/teacher.yaml`, 5,000 images, one seed. Every
row with its command stands in `cifar10.json`; the same command and seed give the same figure again on the same machine.
What was tried of it without a GPU: `cifar10_cpu.md`.

Our figures are Fréchet distances in the 64 features of `cifar10_resnet56`. **They are not FID**: only their order can
be compared with the paper's FID (50,000 images, 35.7M teacher), which stands in brackets as published. `open` is not
measured yet; nothing is filled in for it."""

READING = """Why the paper's figures may not be those of its method: the public reference code resets its
caches before every step on CIFAR-10, so that activations are never quantized at any bit width, and an earlier version
refreshed in full precision every tenth step. The published A8 to A3 rows of the dynamic per-image quantizer (4.10 to
4.31 at W8, against 4.24 in full precision) hardly depend on the bits, which fits both."""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The whole file."""
    done = sum(row["measured"] for row in rows)
    lines = [HEAD, "", f"**{done} of {len(rows)} rows are measured.** {machines(rows)}".strip(), ""]
    for teacher in ("small", "large"):
        for steps in sorted({row["steps"] for row in rows if row["teacher"] == teacher}, reverse=True):
            part = [row for row in rows if row["teacher"] == teacher and row["steps"] == steps]
            lines += [f"## {teacher.capitalize()} teacher, {steps} steps", "", *tables(part, teacher), ""]
    lines += ["## What agrees", "", *agreement(rows), "", "## The paper's A3 row, and refreshes", "", READING, ""]
    lines += [*refresh(rows), "", "## Time", "", *times(rows), "", "## Open rows", "", *open_rows(rows)]
    return "\n".join(lines) + "\n"


def tables(rows: list[dict[str, Any]], teacher: str) -> list[str]:
    """Distances to real images and to the teacher's, and PSNR, of one teacher and number of steps."""
    arms = ARMS if teacher == "small" else ("ptq", "modiff")
    head = ["| W/A | " + " | ".join(f"{TITLES[arm]}" for arm in arms) + " |", "|---|" + "---|" * len(arms)]
    teacher_fid = value("teacher_fid", rows)
    lines = [f"Fréchet distance to real images, [paper's FID]. Full precision, ours: {teacher_fid}.", "", *head]
    weights = [w for w in WEIGHTS if any(row["weight_bits"] == w for row in rows)]
    for weight in weights:
        plain = [r for r in rows if r["weight_bits"] == weight and r["activation_bits"] is None]
        if plain:
            lines.append(f"| {weight}/32 | {cell('fid', plain)} |" + " |" * (len(arms) - 1))
        lines += [bits_row(rows, weight, bits, arms, "fid") for bits in BITS if has(rows, weight, bits)]
    if teacher == "small":
        lines += ["", "One scale per …, W8:", "", "| A, scale per | plain | modulated |", "|---|---|---|"]
        for granularity in OTHER_GRANULARITIES:
            for bits in (4, 3):
                cells = [cell("fid", pick(rows, 8, bits, arm, granularity)) for arm in ("ptq", "modiff")]
                lines.append(f"| A{bits}, {granularity} | " + " | ".join(cells) + " |")
    titles = {
        "fid_to_teacher": "Fréchet distance to the teacher's images",
        "psnr_db": "PSNR to the teacher's images, dB",
    }
    for key, title in titles.items():
        if not values(rows, key):
            lines += ["", f"{title}: {OPEN}, the same rows."]
            continue
        lines += ["", f"{title}:", "", *head]
        lines += [bits_row(rows, w, bits, arms, key) for w in weights for bits in BITS if has(rows, w, bits)]
    return lines


def has(rows: list[dict[str, Any]], weight: int, bits: int) -> bool:
    """Whether there are rows of these bits."""
    return any(row["weight_bits"] == weight and row["activation_bits"] == bits for row in rows)


def bits_row(rows: list[dict[str, Any]], weight: int, bits: int, arms: tuple[str, ...], key: str) -> str:
    """One line of a table."""
    cells = [cell(key, pick(rows, weight, bits, arm)) for arm in arms]
    return f"| {weight}/{bits} | " + " | ".join(cells) + " |"


def pick(
    rows: list[dict[str, Any]],
    weight: int,
    bits: int,
    arm: str,
    granularity: str = "sample",
    refresh_every: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of one configuration, all seeds."""
    wanted = (weight, bits, arm, granularity, refresh_every)
    keys = ("weight_bits", "activation_bits", "arm", "granularity", "refresh_every")
    return [row for row in rows if tuple(row[key] for key in keys) == wanted]


def cell(key: str, chosen: list[dict[str, Any]]) -> str:
    """Our figure, and in the table of distances to real images the paper's."""
    if not chosen:
        return ""
    text = value(key, chosen)
    published = chosen[0]["paper_fid"]
    return f"{text} [{published:g}]" if key == "fid" and published is not None else text


def value(key: str, chosen: list[dict[str, Any]]) -> str:
    """Mean and half the spread over the measured seeds."""
    found = values(chosen, key)
    if not found:
        return OPEN
    mean = statistics.fmean(found)
    text = f"{mean:.2f}" if abs(mean) >= 1 else f"{mean:.4f}"
    return text if len(found) == 1 else f"{text} ± {(max(found) - min(found)) / 2:.2g}"


def values(chosen: list[dict[str, Any]], key: str) -> list[float]:
    """Measured figures; a figure may be missing, for example the distance of too few images."""
    return [row[key] for row in chosen if row["measured"] and row.get(key) is not None]


def machines(rows: list[dict[str, Any]]) -> str:
    """Where they were measured."""
    measured = [row for row in rows if row["measured"]]
    found = sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}, {r['precision']}" for r in measured})
    return f"Machine: {'; '.join(found)}." if found else "The figures need a GPU for about half an hour."


def agreement(rows: list[dict[str, Any]]) -> list[str]:
    """For every pair of plain and modulated rows with published figures: whether ours are in the same order."""
    lines = []
    groups = sorted({(r["teacher"], r["steps"], r["weight_bits"], r["granularity"]) for r in rows}, key=str)
    for teacher, steps, weight, granularity in groups:
        part = [r for r in rows if (r["teacher"], r["steps"]) == (teacher, steps)]
        for bits in BITS:
            pair = [pick(part, weight, bits, arm, granularity) for arm in ("ptq", "modiff")]
            if not all(pair) or any(p[0]["paper_fid"] is None for p in pair):
                continue
            ours = [values(p, "fid") for p in pair]
            if not all(ours):
                continue
            mine = order(*(statistics.fmean(o) for o in ours))
            paper = order(*(p[0]["paper_fid"] for p in pair))
            verdict = "agrees" if mine == paper else "**differs**"
            lines.append(
                f"* {teacher}, {steps} steps, W{weight}A{bits}, {granularity}: {verdict}; ours: {mine}, paper: {paper}."
            )
    return lines or ["Nothing can be said yet: no pair of rows that the paper published is measured."]


def order(plain: float, modulated: float) -> str:
    """Which arm is better, where the two are a factor of two apart."""
    if max(plain, modulated) < RATIO * min(plain, modulated):
        return "no clear difference"
    return "modulated better" if modulated < plain else "plain better"


def refresh(rows: list[dict[str, Any]]) -> list[str]:
    """The cheap test of the paper's A3 row."""
    lines = [
        f"The test: the same W/A3 row with `--model.config.modulation.refresh_every {REFRESH}`.",
        "",
        "| teacher, steps | W | as specified | refreshed | full precision | paper |",
        "|---|---|---|---|---|---|",
    ]
    for teacher, steps in sorted({(r["teacher"], r["steps"]) for r in rows}, key=lambda k: (k[0] != "small", -k[1])):
        part = [r for r in rows if (r["teacher"], r["steps"]) == (teacher, steps)]
        for weight in WEIGHTS:
            refreshed = pick(part, weight, 3, "modiff", refresh_every=REFRESH)
            if not refreshed:
                continue
            plain = pick(part, weight, 3, "modiff")
            published = plain[0]["paper_fid"] if plain else None
            cells = [value("fid", plain), value("fid", refreshed), value("teacher_fid", part)]
            cells.append("-" if published is None else f"{published:g}")
            lines.append(f"| {teacher}, {steps} | W{weight} | " + " | ".join(cells) + " |")
    return lines


def times(rows: list[dict[str, Any]]) -> list[str]:
    """How much slower a simulated student is than its teacher."""
    lines = []
    for teacher in ("small", "large"):
        for arm in ARMS:
            found = values([r for r in rows if r["teacher"] == teacher and r["arm"] == arm], "time_ratio")
            if found:
                spread = f"{statistics.median(found):.2f} (median of {len(found)} rows, at most {max(found):.2f})"
                lines.append(f"* {teacher} teacher, {TITLES[arm]}: {spread} times the teacher's time per evaluation.")
    return lines or ["The student's time per evaluation, in units of the teacher's, is open. At most 2 is the aim."]


def open_rows(rows: list[dict[str, Any]]) -> list[str]:
    """What is not measured, one line for each teacher, number of steps and seed."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if not row["measured"]:
            where, _, name = row["id"].rpartition("/")
            groups.setdefault(where, []).append(name)
    return [f"* `{where}` ({len(names)}): " + ", ".join(names) for where, names in groups.items()] or ["None."]
