"""Tables of results: for the terminal, for Markdown, and as cells for the HTML pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

from modiff.errors import ConfigError
from modiff.lit.report.result import Result
from modiff.lit.report.words import number
from modiff.metrics.figures import Figure, all_figures

Rows = Sequence[tuple[str, Result]]
FULL_PRECISION = "full precision"
SAME = "–"  # of the teacher against itself: there is nothing to measure


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: What is shown.
        value: The number behind the text, to sort by; None: there is none.
        link: Where the text leads on a page; None: nowhere.
    """

    text: str
    value: float | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Column:
    """One column of a comparison of recipes.

    Args:
        title: Heading in full.
        stacked: Short heading, so that ten columns fit a terminal of 80 characters.
        student: The cell of a recipe.
        teacher: The cell of the full-precision row, from the first recipe's result.
        better: Whether higher or lower values are better; None where neither is.
    """

    title: str
    stacked: str
    student: Callable[[Result], Cell]
    teacher: Callable[[Result], Cell]
    better: str | None = None


def numeric(value: float | None, digits: int = 4) -> Cell:
    """The cell of a number."""
    return Cell(number(value, digits), value)


def _of_cost(title: str, stacked: str, key: str, teacher_key: str | None) -> Column:
    """A column of :class:`~modiff.lit.report.result.CostTotals`; without ``teacher_key``, the teacher has none: 0."""
    return Column(
        title,
        stacked,
        lambda result: numeric(result.cost[key]),  # type: ignore[index,literal-required]
        lambda result: numeric(result.cost[teacher_key] if teacher_key else 0.0),  # type: ignore[index,literal-required]
        "lower",
    )


def _quantized(result: Result) -> Cell:
    assert result.evaluations is not None
    quantized, total = result.evaluations["quantized"], result.evaluations["total"]
    return Cell(f"{quantized}/{total}", quantized / max(total, 1))


def _unquantized(result: Result) -> Cell:
    assert result.evaluations is not None
    return Cell(f"0/{result.evaluations['total']}", 0.0)


COSTS = (
    _of_cost("GBOPs per evaluation", "GBOPs\nper\neval.", "gbops_per_evaluation", "teacher_gbops_per_evaluation"),
    _of_cost("weights, MiB", "weights\nMiB", "weight_mib", "teacher_weight_mib"),
    _of_cost("state, MiB per image", "state\nMiB/\nimage", "state_mib_per_image", None),
    Column(
        "time, x teacher",
        "time\nx",
        lambda result: numeric(result.timing["time_ratio"], 3),
        lambda result: Cell("1.00", 1.0),
        "lower",
    ),
    Column("quantized / all evaluations", "quant.\n/ all", _quantized, _unquantized),
)


def _of_figure(figure: Figure) -> Column:
    def student(result: Result) -> Cell:
        return numeric(result.value(f"student.{figure.name}"), figure.digits)

    def teacher(result: Result) -> Cell:
        return numeric(result.value(f"teacher.{figure.name}"), figure.digits) if "teacher" in figure.of else Cell(SAME)

    return Column(figure.title, figure.column, student, teacher, figure.better)


def columns() -> list[Column]:
    """The columns behind the recipe's name: every figure that asks for one, then cost."""
    return [*(_of_figure(figure) for figure in all_figures() if figure.column), *COSTS]


def cells(rows: Rows) -> list[list[Cell]]:
    """The cells of a comparison: full precision first, then one row for each recipe; the name comes first.

    Args:
        rows: Recipes' names and results, all against the same teacher images.

    Raises:
        ConfigError: There is no row.
    """
    if not rows:
        raise ConfigError("There are no recipes to tabulate; give at least one (name, result).")
    kinds = columns()
    table = [[Cell(FULL_PRECISION), *(column.teacher(rows[0][1]) for column in kinds)]]
    return table + [[Cell(name), *(column.student(result) for column in kinds)] for name, result in rows]


def features_note(result: Result) -> str:
    """Say what a Fréchet distance was measured with; without it the number means nothing."""
    features = result.findings.features
    if features.get("network") is None:
        return "There was no feature network, so there is no Fréchet distance; give one with --model.features."
    return (
        f"Fréchet distances are between the {features['num_features']} features that {features['network']} gives for "
        f"{features['num_images']} images; they compare with no distance of another network or count."
    )


def missing_figures(result: Result, in_tables: bool = False) -> list[tuple[Figure, str, str]]:
    """Figures that a result lacks.

    Args:
        result: The result.
        in_tables: Look at the figures with a column only.

    Returns:
        The figure, whose images lack it (``teacher`` or ``student``), and why.
    """
    return [
        (figure, who, result.reason(f"{who}.{figure.name}"))
        for figure in all_figures()
        for who in figure.of
        if (figure.column or not in_tables) and result.value(f"{who}.{figure.name}") is None
    ]


def notes(rows: Rows) -> list[str]:
    """What a reader of the table must know: the feature network, and why cells are empty."""
    seen: dict[str, list[str]] = {}
    for name, result in rows:
        for figure, who, reason in missing_figures(result, in_tables=True):
            names = seen.setdefault(f"{figure.label} not available ({{}}): {reason}.", [])
            owner = FULL_PRECISION if who == "teacher" else name
            names += [owner] if owner not in names else []
    texts = [features_note(rows[0][1])]
    return texts + [text.replace("({})", f"({', '.join(names)})", 1) for text, names in seen.items()]


def metrics_table(rows: Rows) -> Table:
    """The comparison as a table for the terminal; arguments and errors as in :func:`cells`."""
    body = [[str(cell) for cell in row] for row in cells(rows)]
    table = Table(box=box.SIMPLE_HEAD, padding=0, caption=escape("\n".join(notes(rows))), caption_justify="left")
    for i, title in enumerate(("recipe", *(column.stacked for column in columns()))):
        # Only names are broken where the terminal is narrow, never a number.
        widest = max(len(text) for text in [*title.split("\n"), *(row[i] for row in body)])
        table.add_column(
            title, justify="right" if i else "left", overflow="fold", min_width=widest if i else 11, no_wrap=bool(i)
        )
    for row in body:
        table.add_row(*(escape(text) for text in row))
    return table


def result_table(recipe: str, result: Result) -> Table:
    """The figures of one recipe as a table for the terminal: one line for each that student or teacher has."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=escape(recipe), title_justify="left")
    for title in ("", "student", "teacher"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for figure in all_figures():
        student, teacher = (result.value(f"{who}.{figure.name}") for who in ("student", "teacher"))
        if student is not None or teacher is not None:
            absent = "n/a" if "teacher" in figure.of else SAME
            table.add_row(escape(figure.title), number(student), number(teacher, missing=absent))
    for column in COSTS:
        table.add_row(column.title, str(column.student(result)), str(column.teacher(result)))
    return table


def markdown_table(rows: Rows) -> str:
    """The comparison as a Markdown table with its notes below; arguments and errors as in :func:`cells`."""
    titles = ["recipe", *(column.title for column in columns())]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    lines += [[markdown_cell(str(cell)) for cell in row] for row in cells(rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(markdown_cell(note) for note in notes(rows)) + "\n"


def markdown_cell(text: str) -> str:
    """Escape what would end a cell, start markup or let HTML through."""
    for mark in "\\`*[]|<":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
