"""A search in Weights & Biases: its points as a table, the frontier's quality and cost as a scatter plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modiff.lit.runs.wandb import WandbMode, finish_wandb, make_wandb_logger
from modiff.lit.search.goals import COSTS, QUALITIES
from modiff.lit.search.space import Setting

COLUMNS = ["setting", "on_frontier", *QUALITIES, *COSTS, "evaluations", "images"]


def log_search(mode: WandbMode, folder: Path, result: dict[str, Any]) -> None:
    """Log what a search found as one run of job type ``search``; nothing where W&B is disabled.

    Args:
        mode: As on the command line.
        folder: The search's.
        result: Of :func:`modiff.lit.search.frontier.write_frontier`.
    """
    logger = make_wandb_logger(mode, folder, folder.name, result["about"], job_type="search", tags=["search"])
    if logger is None:
        return
    import wandb

    front = [point["setting"] for point in result["frontier"]]
    table = wandb.Table(columns=COLUMNS)
    for point in result["points"]:
        numbers = [*(point["quality"].get(q) for q in QUALITIES), *(point["cost"][c] for c in COSTS)]
        counts = [point["evaluations"], point["images"]]
        table.add_data(str(Setting(**point["setting"])), point["setting"] in front, *numbers, *counts)
    name = result["quality"].split(" ")[0]
    run = logger.experiment
    run.log({"search/points": table, "search/frontier": wandb.plot.scatter(table, result["cost"], name)})
    if result["best"] is not None:
        run.summary["search/best"] = str(Setting(**result["best"]["setting"]))
        run.summary[f"search/best_{result['cost']}"] = result["best"]["cost"][result["cost"]]
        run.summary[f"search/best_{name}"] = result["best"]["quality"][name]
    finish_wandb(logger)
