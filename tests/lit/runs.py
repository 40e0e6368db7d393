"""Finished runs of ``modiff evaluate``, as several test files read them."""

from __future__ import annotations

import json
from pathlib import Path

FILES = {
    ".holder.json",
    ".lock",
    "status.json",
    "config.yaml",
    "cost.json",
    "cost.png",
    "images",
    "logs",
    "metrics.json",
    "report.html",
    "run.json",
    "samples.png",
    "samples.safetensors",
    "trajectory_errors.json",
    "trajectory_errors.png",
}


def read(folder: Path, name: str = "metrics.json") -> dict:
    return json.loads((folder / name).read_text())


def without_times(folder: Path) -> dict:
    """The metrics that a repetition has to give bit for bit."""
    changing = ("seconds", "seconds_per_image_evaluation", "time_ratio")
    return {key: value for key, value in read(folder).items() if key not in changing}
