"""Turns the results of a finished evaluation into its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from modiff.lit.cli.student import StudentCLI
from modiff.lit.modules.student import LitStudent
from modiff.lit.report import plots
from modiff.lit.report.pages import write_report
from modiff.lit.runs.directory import RunDirectory
from modiff.storage.atomic import write_json
from modiff.student.swap import describe


class Writer:
    """Turns the results of a finished run into files.

    Args:
        cli: The parsed recipe.
        run: Its directory.
        logger: W&B, or None.
    """

    def __init__(self, cli: StudentCLI, run: RunDirectory, logger: Any) -> None:
        self.cli, self.run, self.logger = cli, run, logger

    def write(self, trainer: Trainer, module: LitStudent, seconds: float) -> None:
        """Write metrics.json, pictures and the report; then drop the batches kept for resuming."""
        results, folder = module.results, self.run.path
        metrics = self.metrics(results, seconds)
        errors, rows = results.get("errors"), results["cost_rows"]
        if errors:
            plots.trajectory_errors_plot(errors, folder / "trajectory_errors.png", self.cli.recipe)
            write_json(folder / "trajectory_errors.json", errors)
        plots.cost_plot(rows, folder / "cost.png")
        write_json(folder / "cost.json", rows)
        write_report(
            folder,
            recipe=self.cli.recipe,
            metrics=metrics,
            errors=errors,
            cost_rows=rows,
            config_yaml=self.cli.dump(),
            description=str(describe(module.student)),  # type: ignore[arg-type]
        )
        write_json(folder / "metrics.json", metrics)
        self.log(trainer, metrics, folder)
        self.run.mark("complete")
        shutil.rmtree(folder / "partial", ignore_errors=True)

    def metrics(self, results: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The content of metrics.json."""
        return {
            **results["fidelity"],
            "cost": results["cost"],
            "evaluations": results["evaluations"],
            "num_images": self.cli.num_images,
            "seconds": seconds,
            **results.get("timing", {"seconds_per_image_evaluation": None, "time_ratio": None}),
            "seed": self.cli.config.seed,
            "provenance": results["provenance"],
        }

    def log(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        """Numbers to every logger, pictures to W&B."""
        numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, (int, float))}
        for logger in trainer.loggers:
            if logger is not self.logger:
                logger.log_metrics(numbers, step=0)
                logger.save()
        if self.logger is None:
            return
        try:
            self.logger.log_metrics(numbers, step=0)
            for name in ("samples", "trajectory_errors", "cost"):
                if (folder / f"{name}.png").is_file():
                    self.logger.log_image(name, [str(folder / f"{name}.png")])
        except Exception as error:  # whatever W&B raises must not stop a run
            print(f"W&B: logging failed ({type(error).__name__}: {error}); everything is in {folder}.")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted names.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
