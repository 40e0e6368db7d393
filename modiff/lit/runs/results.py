"""Turns the result of a finished evaluation into its files, and reads it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from safetensors.torch import load_file

from modiff.lit.cli.student import StudentCLI
from modiff.lit.modules.student import LitStudent
from modiff.lit.report import plots
from modiff.lit.report.pages import write_report
from modiff.lit.report.result import Result
from modiff.lit.report.tables import result_table
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.wandb import Guarded
from modiff.lit.runs.wandb_content import log_artifacts, log_pictures, log_result
from modiff.storage.atomic import write_json
from modiff.student.swap import describe

METRICS, ERRORS, OPERATORS = "metrics.json", "trajectory_errors.json", "cost.json"


class Writer:
    """Turns the result of a finished run into files.

    Args:
        cli: The parsed recipe.
        run: Its directory.
        logger: W&B, or None.
        guarded: The same, for calls that may fail.
    """

    def __init__(self, cli: StudentCLI, run: RunDirectory, logger: Any, guarded: Guarded) -> None:
        self.cli, self.run, self.logger, self.guarded = cli, run, logger, guarded

    def write(self, trainer: Trainer, module: LitStudent, seconds: float) -> None:
        """Write metrics.json, pictures and the report; then drop the batches kept for resuming."""
        result, folder = module.result, self.run.path
        result.num_images, result.seed, result.seconds = self.cli.num_images, self.cli.config.seed, seconds
        if result.errors:
            plots.trajectory_errors_plot(result.errors, folder / "trajectory_errors.png", self.cli.recipe)
            write_json(folder / ERRORS, result.errors)
        plots.cost_plot(result.operators, folder / "cost.png")
        write_json(folder / OPERATORS, result.operators)
        description = str(describe(module.student))  # type: ignore[arg-type]
        write_report(
            folder, recipe=self.cli.recipe, result=result, config_yaml=self.cli.dump(), description=description
        )
        write_json(folder / METRICS, result.as_json())
        self.log(trainer, module, result, folder)
        self.run.mark("complete")
        shutil.rmtree(folder / "partial", ignore_errors=True)

    def log(self, trainer: Trainer, module: LitStudent, result: Result, folder: Path) -> None:
        """Numbers to every logger; curves, tables, pictures and artifacts to W&B."""
        numbers = result.numbers()
        for logger in trainer.loggers:
            if logger is not self.logger:
                logger.log_metrics(numbers, step=0)
                logger.save()
        self.guarded(lambda run: log_result(run, result, load_file(str(folder / "samples.safetensors"))))
        self.guarded(lambda run: log_pictures(run, folder))
        self.guarded(lambda run: log_artifacts(run, folder, module, self.cli.recipe, result.provenance))


def read_result(folder: Path) -> Result:
    """The result that :class:`Writer` left in a directory."""
    result = Result.from_json(json.loads((folder / METRICS).read_text()))
    if (folder / ERRORS).is_file():
        result.errors = json.loads((folder / ERRORS).read_text())
    if (folder / OPERATORS).is_file():
        result.operators = json.loads((folder / OPERATORS).read_text())
    return result


def print_result(recipe: str, result: Result, folder: Path) -> None:
    """Print the figures of a run and where its report is."""
    Console(width=None).print(result_table(recipe, result))
    print(f"Report: {folder / 'report.html'}")
