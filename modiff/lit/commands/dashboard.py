"""``modiff dashboard``: the W&B workspace and report of a project."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from modiff.lit.cli.errors import parse_plainly
from modiff.lit.runs.dashboard import dashboard as make
from modiff.lit.runs.dashboard import publish
from modiff.lit.runs.launchers import settle_single_rank
from modiff.lit.runs.wandb import has_credentials, unreachable
from modiff.storage.atomic import write_json


def make_parser() -> ArgumentParser:
    """Parser of ``modiff dashboard``."""
    parser = ArgumentParser(
        prog="modiff dashboard",
        exit_on_error=False,
        description="Build the workspace and the report of a W&B project: bits and cost against quality, error over "
        "time, samples, live progress. Without credentials or a network both are written as JSON.",
    )
    project = os.environ.get("WANDB_PROJECT", "modiff")
    parser.add_argument("--project", type=str, default=project, help="Of W&B.")
    parser.add_argument("--entity", type=str | None, default=os.environ.get("WANDB_ENTITY"), help="User or team.")
    parser.add_argument("--json", type=str | None, default=None, help="Write a JSON file, and send nothing.")
    return parser


def dashboard(args: Sequence[str]) -> int:
    """``modiff dashboard [--project P] [--entity E] [--json FILE]``."""
    settle_single_rank("dashboard")
    options = parse_plainly(make_parser(), args)
    found = make(options.project, options.entity)
    target = options.json
    if target is None:
        problem = unreachable() if has_credentials() else "there are no credentials (`wandb login`)"
        if problem is not None:
            target = "dashboard.json"
            print(f"W&B: {problem}; the dashboard goes to a file instead.")
    if target is not None:
        write_json(Path(target), json.loads(json.dumps(found)))
        print(f"Dashboard: {target}")
        return 0
    for address in publish(found):
        print(f"Dashboard: {address}")
    return 0
