"""``frontier.html``: an interactive page of a search's result that needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from modiff.lit.search.goals import COSTS
from modiff.lit.search.space import Setting


def write_page(folder: Path, result: dict[str, Any]) -> Path:
    """Write ``frontier.html`` from what :func:`modiff.lit.search.frontier.write_frontier` returned."""
    environment = Environment(
        loader=PackageLoader("modiff.lit.search", "."),
        autoescape=select_autoescape(["html", "jinja"]),
        undefined=StrictUndefined,
    )
    name, _, bound = result["quality"].split(" ")
    rows = [row(point, result) for point in result["points"]]
    data = {"rows": rows, "quality": name, "bound": float(bound), "cost": result["cost"], "unit": result["cost_unit"]}
    # "</" would end the script element that holds the data.
    text = environment.get_template("frontier.html.jinja").render(
        result=result,
        rows=rows,
        quality_name=name,
        cost_label=COSTS[result["cost"]][0],
        data=json.dumps(data).replace("</", "<\\/"),
    )
    path = folder / "frontier.html"
    path.write_text(text, encoding="utf-8")
    return path


def row(point: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """One point as the page shows it."""
    frontier = {json.dumps(p["setting"], sort_keys=True): p for p in result["frontier"]}
    own = frontier.get(json.dumps(point["setting"], sort_keys=True))
    best = result["best"] is not None and result["best"]["setting"] == point["setting"]
    return {
        "name": str(Setting(**point["setting"])),
        "x": point["cost"][result["cost"]],
        "y": point["quality"][result["quality"].split(" ")[0]],
        "images": point["images"],
        "evaluations": point["evaluations"],
        **{cost: point["cost"][cost] for cost in COSTS},
        "front": own is not None,
        "best": best,
        "command": "" if own is None else own["command"],
    }
