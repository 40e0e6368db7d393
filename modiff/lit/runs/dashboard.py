"""What a project's W&B workspace and report show, as plain data, and the same through wandb-workspaces."""

from __future__ import annotations

import warnings
from typing import Any

from modiff.errors import ConfigError
from modiff.lit.runs import wandb_content as keys

BITS = "model.config.activation.bits"


def dashboard(project: str, entity: str | None = None) -> dict[str, Any]:
    """Sections of the workspace and blocks of the report; every key is one that a run logs."""
    bits = _scatter("Bits against quality", f"config:{BITS}", "student.psnr_db")
    distance = _scatter("Bits against Fréchet distance", f"config:{BITS}", "student.fid_to_teacher")
    cost = _scatter("Cost against quality", "cost.gbops_per_evaluation", "student.psnr_db")
    size = _scatter("Size against quality", "cost.weight_mib", "student.relative_l2")
    curve = _lines("Error of x_t over time", keys.TIMESTEP, [keys.SAMPLE_ERROR])
    operators = _lines("Error of the operators over time", keys.TIMESTEP, [keys.OPERATOR_ERROR, keys.WORST_ERROR])
    rate = _lines("Images per second", keys.IMAGES_DONE, [keys.RATE])
    left = _lines("Seconds left", keys.IMAGES_DONE, [keys.LEFT])
    heat = _media("Error by operator and time step", [keys.PICTURES["trajectory_errors"]])
    grid = _media("Teacher above student", [keys.PICTURES["samples"]])
    costly = _media("The operators that cost most", [keys.PICTURES["cost"]])
    sections = [
        {"name": "Quality", "panels": [bits, distance, cost, size]},
        {"name": "Error over time", "panels": [curve, operators, heat, _table(keys.ERROR_TABLE)]},
        {"name": "Samples", "panels": [grid, _table(keys.SAMPLE_TABLE)]},
        {"name": "Cost", "panels": [costly, _table(keys.COST_TABLE)]},
        {"name": "Progress", "panels": [rate, left]},
    ]
    report = [
        {"heading": "Bits against quality", "panels": [bits, distance]},
        {"heading": "Cost against quality", "panels": [cost, size]},
        {"heading": "Error over time", "panels": [curve, operators]},
    ]
    return {"project": project, "entity": entity, "workspace": "modiff", "sections": sections, "report": report}


def used_keys(found: dict[str, Any]) -> set[str]:
    """Every key that a dashboard names, those of the recipe (``config:``) excepted."""
    panels = [panel for part in (*found["sections"], *found["report"]) for panel in part["panels"]]
    named = [key for panel in panels for key in (panel.get("x"), *panel["y"]) if key]
    return {key for key in named if not key.startswith("config:")}


def publish(found: dict[str, Any]) -> list[str]:
    """Make the workspace and the report; returns their addresses.

    Raises:
        ConfigError: wandb-workspaces is not installed, or the server refuses.
    """
    workspace, report = build(found)
    try:
        workspace.save()
        report.save()
    except Exception as error:  # network, rights, quota: the server's own words
        raise ConfigError(
            f"W&B refuses the dashboard ({type(error).__name__}: {error}). Write it by --json."
        ) from error
    return [workspace.url, report.url]


def build(found: dict[str, Any]) -> tuple[Any, Any]:
    """The workspace and the report as objects of wandb-workspaces; nothing is sent.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what it is made of
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(
            "Dashboards are made by wandb-workspaces, which is not installed. Run: pip install 'modiff[dashboard]', or "
            "write the dashboard as JSON: --json FILE."
        ) from error
    entity, project = found["entity"] or "", found["project"]
    sections = [
        ws.Section(name=part["name"], panels=[_panel(wr, panel) for panel in part["panels"]], is_open=True)
        for part in found["sections"]
    ]
    workspace = ws.Workspace(entity=entity, project=project, name=found["workspace"], sections=sections)
    blocks: list[Any] = [wr.P("Made by modiff dashboard; the panels follow the runs of the project.")]
    for part in found["report"]:
        grid = wr.PanelGrid(
            runsets=[wr.Runset(entity=entity, project=project)], panels=[_panel(wr, p) for p in part["panels"]]
        )
        blocks += [wr.H2(part["heading"]), grid]
    report = wr.Report(entity=entity, project=project, title=f"{project}: what quantization costs", blocks=blocks)
    return workspace, report


def _panel(wr: Any, panel: dict[str, Any]) -> Any:
    if panel["kind"] == "lines":
        return wr.LinePlot(title=panel["title"], x=panel["x"], y=panel["y"])
    if panel["kind"] == "scatter":
        return wr.ScatterPlot(title=panel["title"], x=_metric(wr, panel["x"]), y=_metric(wr, panel["y"][0]))
    if panel["kind"] == "media":
        return wr.MediaBrowser(title=panel["title"], media_keys=panel["y"])
    return wr.WeavePanelSummaryTable(table_name=panel["y"][0])


def _metric(wr: Any, key: str) -> Any:
    kind, _, name = key.partition(":")
    return wr.Config(name) if kind == "config" else wr.SummaryMetric(key)


def _lines(title: str, x: str, y: list[str]) -> dict[str, Any]:
    return {"kind": "lines", "title": title, "x": x, "y": y}


def _scatter(title: str, x: str, y: str) -> dict[str, Any]:
    return {"kind": "scatter", "title": title, "x": x, "y": [y]}


def _media(title: str, names: list[str]) -> dict[str, Any]:
    return {"kind": "media", "title": title, "x": None, "y": names}


def _table(key: str) -> dict[str, Any]:
    return {"kind": "table", "title": key, "x": None, "y": [key]}
