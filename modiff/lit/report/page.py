"""Pieces of a self-contained HTML page: everything escaped, pictures embedded, no script, no request."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from modiff.errors import ConfigError
from modiff.storage.atomic import write_text

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --text: #1c2230; --soft: #5c6575; --line: #dde1e7;
  --mark: #2f6db5; --code: #f0f2f5; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1d2127; --text: #e6e8ec; --soft: #9aa3b2;
  --line: #343a44; --mark: #7db1ee; --code: #16191e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
p { margin: .5rem 0; max-width: 84ch; overflow-wrap: anywhere; }
figcaption { margin-top: .4rem; }
.kind { color: var(--soft); margin: 0 0 .2rem; font-size: .9rem; }
.lead { font-size: 1.1rem; }
.soft, caption, figcaption { color: var(--soft); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.2rem 1.3rem;
  margin: 1.1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; margin: 1.3rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; color: var(--mark);
  font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; font-size: .84rem; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 8rem; }
.number { text-align: right; }
td.number { white-space: nowrap; }
figure { margin: .6rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 6px; }
img.pixels { image-rendering: pixelated; }
pre { background: var(--code); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; margin: .5rem 0;
  font: .8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
a { color: var(--mark); }
code { font-size: .9em; background: var(--code); border-radius: 4px; padding: .05em .3em; overflow-wrap: anywhere; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Html(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""

    __slots__ = ()


def safe(text: object) -> Html:
    """Escape ``text`` unless it is :class:`Html`."""
    return text if isinstance(text, Html) else Html(escape(str(text), quote=True))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """One element; ``class_`` stands for ``class``.

    >>> element("p", "a < b", element("b", "c"), class_="soft")
    '<p class="soft">a &lt; b<b>c</b></p>'
    """
    given = "".join(f' {name.rstrip("_")}="{escape(value, quote=True)}"' for name, value in attributes.items())
    return Html(f"<{tag}{given}>{''.join(safe(part) for part in content)}</{tag}>")


def section(title: str, *content: object) -> Html:
    """A card with a heading."""
    return element("section", element("h2", title), *content)


def folded(title: str, *content: object) -> Html:
    """Content that opens on a click, without a script."""
    return element("details", element("summary", title), *content)


def tiles(entries: Iterable[tuple[str, str]]) -> Html:
    """Headline numbers, each with what it is."""
    return element("div", *(_tile(value, text) for value, text in entries), class_="tiles")


def _tile(value: str, text: str) -> Html:
    return element("div", element("b", value), element("span", text), class_="tile")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> Html:
    """A table whose first column names its rows; the columns of ``numbers`` are aligned right."""
    right = set(numbers)

    def cell(tag: str, i: int, text: object, **scope: str) -> Html:
        return element(tag, text, **scope, **({"class_": "number"} if i in right else {}))

    head = element("tr", *(cell("th", i, text, scope="col") for i, text in enumerate(headers)))
    body = (
        element("tr", *(cell("td", i, text) if i else cell("th", i, text, scope="row") for i, text in enumerate(row)))
        for row in rows
    )
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="wide")


def picture(path: Path, description: str, pixels: bool = False) -> Html:
    """Embed a PNG, with ``description`` for those who cannot see it and as caption.

    Raises:
        ConfigError: The file is missing.
    """
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"The report needs {path}, which does not exist. Draw it before writing the report."
        ) from None
    text = escape(description, quote=True)
    kind = ' class="pixels"' if pixels else ""
    image = Html(f'<img{kind} src="data:image/png;base64,{data}" alt="{text}">')
    return element("figure", image, element("figcaption", description))


def link(text: str, path: Path) -> Html:
    """A link to a file given relative to the page."""
    return element("a", text, href="./" + quote(path.as_posix()))


def write_page(path: Path, title: str, content: Iterable[Html]) -> Path:
    """Write the page atomically and return its path."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{safe(title)}</title><style>{STYLE}</style>"
    )
    body = element("main", *content)
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    write_text(path, text)
    return path
