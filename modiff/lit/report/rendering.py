"""Pages from the templates of this package: everything escaped, styles and scripts inside, no request."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modiff.errors import ConfigError
from modiff.lit.report.tables import Cell
from modiff.storage.atomic import write_text

SCRIPTS = ("page.js", "tables.js", "gallery.js", "plots.js", "curves.js", "heatmap.js", "scatter.js")
TEMPLATES = files("modiff.lit.report") / "templates"


@dataclass(frozen=True)
class Heading:
    """Heading of a column.

    Args:
        title: Its text.
        numeric: Cells are aligned right.
        better: ``higher`` or ``lower``, where one of them is better.
    """

    title: str
    numeric: bool = False
    better: str | None = None


@dataclass(frozen=True)
class TableView:
    """A table of a page; its first column names the rows.

    Args:
        caption: What the table holds.
        headings: One for each column.
        rows: Cells.
        sortable: Readers may sort it.
        tall: It scrolls in a box of its own.
        bars: Column whose fractions are drawn as bars behind the text; None: no column.
        best: Row and column of cells that are marked as the best of their column.
    """

    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = True
    tall: bool = False
    bars: int | None = None
    best: set[tuple[int, int]] = field(default_factory=set)


def write_page(path: Path, template: str, title: str, context: Mapping[str, Any]) -> Path:
    """Render a template into ``path``, atomically, and return the path."""
    scripts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    text = (
        _environment()
        .get_template(template)
        .render(
            title=title,
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; "
            "base-uri 'none'; form-action 'none'",
            **context,
        )
    )
    write_text(path, text)
    return path


def picture(path: Path) -> str:
    """A PNG file as a ``data:`` address.

    Raises:
        ConfigError: The file is missing.
    """
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"The report needs {path}, which does not exist. Draw it before writing the report."
        ) from None
    return f"data:image/png;base64,{data}"


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("modiff.lit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
