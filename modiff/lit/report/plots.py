"""Plots of the report. Drawn without pyplot: no display, no global state, nothing to close."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from modiff.errors import ConfigError
from modiff.lit.report.sentences import error_matrix, finite, mean, worst_operators
from modiff.lit.report.tables import Rows
from modiff.storage.atomic import write_file

DPI = 150
NONE = "not available"
BLUE, ORANGE, GREEN, GREY, RED = "#2f6db5", "#e0862b", "#3b8f5a", "#8a8f98", "#b3261e"
REST = "#c9cdd3"
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a8",
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "legend.frameon": False,
    "text.parse_math": False,  # names of operators and recipes are text, whatever they hold (log ticks are ours)
}


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the house's style, written to ``path`` atomically when the block ends without an error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DPI))


def trajectory_errors_plot(errors: Mapping[str, Any], path: Path, title: str) -> None:
    """Draw the error of x_t over the trajectory, and below it operators x evaluations as a heat map.

    Args:
        errors: Keys ``timesteps``, ``operators``, ``operator_error`` and ``sample_error``; relative L2, a fraction.
        path: PNG to write.
        title: Heading, such as the recipe's name.
    """
    matrix = error_matrix(errors)
    count, steps = matrix.shape
    row = min(0.155, max(13.0 / max(count, 1), 0.02))  # inches; up to 110 operators each get a readable label
    heat = max(1.6, row * count)
    with figure_file(path, 11.5, 3.4 + heat) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)
        grid = figure.add_gridspec(2, 2, height_ratios=[2.3, heat], width_ratios=[4.2, 1])
        top = figure.add_subplot(grid[0, 0])
        middle = figure.add_subplot(grid[1, 0], sharex=top)
        bars = figure.add_subplot(grid[1, 1], sharey=middle)
        legend = figure.add_subplot(grid[0, 1])
        legend.set_axis_off()
        _curves(top, errors, matrix)
        legend.legend(*top.get_legend_handles_labels(), loc="upper left", borderaxespad=0)
        image = _heat_map(middle, bars, errors, matrix)
        _name_rows(middle, errors, row)
        if image is not None:
            scale = figure.colorbar(image, cax=legend.inset_axes((0.02, 0.16, 0.96, 0.09)), orientation="horizontal")
            scale.outline.set_visible(False)
            scale.ax.set_title("heat map", fontsize=9, fontweight="normal")
            scale.ax.xaxis.set_major_formatter(PERCENT)
            scale.ax.xaxis.set_minor_formatter("")
        ticks = np.unique(np.linspace(0, max(steps - 1, 0), min(steps, 11)).round().astype(int))
        middle.set_xticks(ticks, [f"{errors['timesteps'][i]}" for i in ticks])
        middle.set_xlabel("timestep t of the evaluation (noise on the left, image on the right)")
        top.tick_params(labelbottom=False)


def _curves(axes: Axes, errors: Mapping[str, Any], matrix: np.ndarray) -> None:
    sample = np.array([finite(v) for v in errors["sample_error"]])
    columns = [c[~np.isnan(c)] for c in matrix.T]
    steps = np.arange(len(sample))
    worst = [c.max() if c.size else math.nan for c in columns]
    median = [float(np.median(c)) if c.size else math.nan for c in columns]
    lines = [("worst operator", worst, RED, 1.0), ("median operator", median, GREY, 1.2), ("x_t", sample, BLUE, 2.2)]
    for label, values, color, width in lines:
        shown = _positive(values)
        axes.plot(steps, shown, color=color, lw=width, label=label, marker="o", ms=3 if len(steps) < 3 else 0)
    shown = np.concatenate([_positive(values) for _, values, _, _ in lines])
    if (shown > 0).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_minor_formatter("")
    else:
        axes.text(0.5, 0.5, "no error above zero was recorded", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    axes.set_ylabel("relative L2 error")
    axes.set_title("Error against the teacher, from the same noise")
    axes.grid(True, which="major")


def _heat_map(axes: Axes, bars: Axes, errors: Mapping[str, Any], matrix: np.ndarray) -> AxesImage | None:
    names = list(errors["operators"])
    worst = {name for name, _ in worst_operators(errors, 5)}
    shown = np.ma.masked_invalid(_positive(matrix))
    axes.set_title("Error of each operator's output (grey: zero, or not recorded)")
    axes.set_facecolor("#d9dce0")
    axes.spines[:].set_visible(False)
    image = None
    if shown.count():
        high = float(shown.max())
        low = max(float(np.nanpercentile(shown.compressed(), 2)), high * 1e-4)  # a stray tiny value hides nothing
        norm = LogNorm(low if low < high else high / 10, high, clip=True)
        image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="magma_r", norm=norm)
    means = np.array([mean(values) for values in matrix])
    colors = [RED if name in worst else GREY for name in names]
    bars.barh(range(len(names)), np.nan_to_num(means), color=colors, height=0.8)
    bars.set_title("mean over steps")
    bars.set_xlim(left=0)
    bars.xaxis.set_major_locator(MaxNLocator(2))
    bars.xaxis.set_major_formatter(PERCENT)
    bars.grid(True, axis="x")
    bars.tick_params(labelleft=False, left=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return image


def _name_rows(axes: Axes, errors: Mapping[str, Any], row: float) -> None:
    """Label rows, blocks set apart by lines; where rows are too thin only every k-th and the worst keep a label."""
    names = list(errors["operators"])
    worst = {name for name, _ in worst_operators(errors, 5)}
    every = max(1, math.ceil(0.115 / row))
    labelled = [i for i, name in enumerate(names) if name in worst]
    labelled += [
        i
        for i in range(0, len(names), every)
        if names[i] not in worst and all(abs(i - j) >= every for j in labelled if names[j] in worst)
    ]
    axes.set_yticks(labelled, [shorten(names[i], 64) for i in labelled], fontsize=7 if row > 0.13 else 6)
    axes.tick_params(axis="y", length=0)
    for tick, i in zip(axes.get_yticklabels(), labelled, strict=True):
        if names[i] in worst:
            tick.set(color=RED, fontweight="bold")
    blocks = [".".join(name.split(".")[:2]) if name.count(".") > 1 else name.split(".")[0] for name in names]
    for i in range(1, len(names)):
        if blocks[i] != blocks[i - 1]:
            axes.axhline(i - 0.5, color="white", lw=1.2)


def cost_plot(rows: Sequence[Mapping[str, Any]], path: Path, top: int = 14) -> None:
    """Draw the operators that cost most: bit operations, weights, state; the rest summed in the last bar.

    Args:
        rows: Keys ``name``, ``weight_bits``, ``activation_bits``, ``gbops``, ``weight_mib`` and ``state_mib`` for each
            operator.
        path: PNG to write.
        top: Operators shown by name in each panel.
    """
    kinds = sorted({(r["weight_bits"], r["activation_bits"]) for r in rows})
    palette = [BLUE, ORANGE, GREEN, "#8e5fb0", "#c2577a", "#5aa9b8", "#a08030", GREY]
    colors = {kind: palette[i % len(palette)] for i, kind in enumerate(kinds)}
    with figure_file(path, 15.5, 1.3 + 0.235 * (min(len(rows), top) + 1)) as figure:
        panels = figure.subplots(1, 3)
        _cost_bars(panels[0], rows, "gbops", "GBOPs per evaluation, linear operators: {:.4g}", top, colors)
        _cost_bars(panels[1], rows, "weight_mib", "Weights as stored, linear operators: {:.4g} MiB", top, colors)
        _cost_bars(panels[2], rows, "state_mib", "State (â and ô) per image: {:.4g} MiB", top, colors)
        handles = [Patch(color=colors[k], label=f"W{k[0]}A{k[1]}") for k in kinds]
        if len(rows) > top:
            handles.append(Patch(color=REST, label="all other operators"))
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, min(len(handles), 8)))


def _cost_bars(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, title: str, top: int, colors: dict[tuple[int, int], str]
) -> None:
    ranked = sorted(rows, key=lambda r: -r[key])
    total, rest = sum(r[key] for r in rows), ranked[top:]
    bars = [(shorten(r["name"], 36), r[key], colors[r["weight_bits"], r["activation_bits"]]) for r in ranked[:top]]
    if rest:
        bars.append((f"{len(rest)} others", sum(r[key] for r in rest), REST))
    axes.set_title(title.format(total))
    if total <= 0:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", color=GREY)
        axes.set(xticks=[], yticks=[])
        return
    axes.barh(range(len(bars)), [value for _, value, _ in bars], color=[color for _, _, color in bars], height=0.72)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=7.5)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.grid(True, axis="x")
    for i, (_, value, _) in enumerate(bars):
        axes.annotate(
            f"{value:.3g} ({value / total:.0%})", (value, i), (3, 0), textcoords="offset points", va="center", size=7
        )


def compare_plot(rows: Rows, path: Path) -> None:
    """Draw several recipes side by side: PSNR to the teacher, Fréchet distance to its images and to real ones.

    Args:
        rows: Recipes' names and results.
        path: PNG to write.

    Raises:
        ConfigError: There is no row.
    """
    if not rows:
        raise ConfigError("compare_plot got no recipes; give at least one (name, result).")
    names = [shorten(name, 34) for name, _ in rows]
    results = [result for _, result in rows]
    with figure_file(path, 11.5, 1.6 + 0.5 * len(rows)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.15])
        identical = ["identical images" if r.value("student.relative_l2") == 0 else NONE for r in results]
        _bars(left, [[r.value("student.psnr_db") for r in results]], [BLUE], log=False, missing=identical)
        left.set_title("PSNR to the teacher's images (higher is better)")
        left.set_xlabel("dB")
        near = [r.value("student.fid_to_teacher") for r in results]
        real = [r.value("student.fid") for r in results]
        series, colors, handles = [near], [ORANGE], [Patch(color=ORANGE, label="to the teacher's images")]
        if any(v is not None for v in real):
            series, colors = [near, real], [ORANGE, GREEN]
            handles.append(Patch(color=GREEN, label="to real images"))
        drawn = [v for values in series for v in values if v is not None and 0 < v < math.inf]
        _bars(right, series, colors, bool(drawn) and max(drawn) > 20 * min(drawn), [NONE] * len(results))
        teacher = results[0].value("teacher.fid")
        if len(series) == 2 and teacher is not None and teacher > 0:
            line = right.axvline(teacher, color=GREEN, ls="--", lw=1.2, label="teacher to real images")
            handles.append(line)
        features = results[0].findings.features
        right.set_title("Fréchet distance (lower is better)")
        scale = ", logarithmic" if right.get_xscale() == "log" else ""
        right.set_xlabel(f"in the {features.get('num_features')} features of {features.get('network')}{scale}")
        left.set_yticks(range(len(names)), names)
        left.set_ylim(len(names) - 0.5, -0.5)
        figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))


def _bars(axes: Axes, series: list[list[float | None]], colors: list[str], log: bool, missing: list[str]) -> None:
    """Horizontal bars, one group per recipe; a value that is missing or has no bar is written out."""
    drawn = [v for values in series for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(PLAIN)
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(10 ** (math.floor(math.log10(min(drawn))) - 0.3), max(drawn) * 4)
    else:
        axes.set_xlim(min([0.0, *drawn]), 1.22 * max([*drawn, 1e-9]))
    height = 0.72 / len(series)
    start = axes.get_xlim()[0]
    for k, (values, color) in enumerate(zip(series, colors, strict=True)):
        for i, value in enumerate(values):
            place = i + (k - (len(series) - 1) / 2) * height
            shown = value is not None and math.isfinite(value) and (value > 0 or not log)
            if value is not None and shown:
                axes.barh(place, value - (start if log else 0), left=start if log else 0, height=height, color=color)
            text = f"{value:.4g}" if value is not None else missing[i]
            axes.annotate(
                text,
                (value if shown else start, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                size=8,
                color="black" if value is not None else GREY,
                style="normal" if value is not None else "italic",
            )
    axes.grid(True, axis="x", which="major")
    axes.tick_params(axis="y", length=0)


def _positive(values: Any) -> np.ndarray:
    """Values with NaN in place of what a logarithmic axis cannot show."""
    array = np.asarray(values, dtype=np.float64)
    return np.where(np.nan_to_num(array) > 0, array, math.nan)


def shorten(name: str, limit: int = 48) -> str:
    """Cut the middle out of a long name: both its block and its last part identify an operator."""
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"
