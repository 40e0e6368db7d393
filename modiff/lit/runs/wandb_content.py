"""What a W&B run holds: curves, tables, pictures, artifacts; under names that dashboards rely on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modiff.lit.report.image_grids import to_pixels
from modiff.lit.report.result import Result

TIMESTEP = "trajectory/timestep"
SAMPLE_ERROR, OPERATOR_ERROR, WORST_ERROR = (
    "trajectory/sample_error",
    "trajectory/operator_error_median",
    "trajectory/operator_error_max",
)
IMAGES_DONE, RATE, LEFT = "progress/images", "progress/images_per_s", "progress/seconds_left"
ERROR_TABLE, COST_TABLE, SAMPLE_TABLE = "tables/error_by_operator", "tables/cost_by_operator", "tables/samples"
PICTURES = {"samples": "pictures/samples", "trajectory_errors": "pictures/error_heat_map", "cost": "pictures/cost"}
AXES = {"trajectory/*": TIMESTEP, "progress/*": IMAGES_DONE}
FIGURES = ("student.psnr_db", "student.relative_l2", "student.fid_to_teacher", "student.fid", "teacher.fid")
COSTS = ("cost.gbops_per_evaluation", "cost.weight_mib", "cost.state_mib_per_image", "time_ratio")
STUDENT_LIMIT_MIB = 512
"""Larger students are named by their hashes in the artifact, and not uploaded."""


def define_axes(run: Any) -> None:
    """Give every group of curves its axis, and the axes no curve of their own."""
    for axis in AXES.values():
        run.define_metric(axis, hidden=True)
    for group, axis in AXES.items():
        run.define_metric(group, step_metric=axis)


def log_progress(run: Any, done: int, rate: float, seconds_left: float | None) -> None:
    """One point of the live progress."""
    point: dict[str, Any] = {IMAGES_DONE: done, RATE: rate}
    if seconds_left is not None:
        point[LEFT] = seconds_left
    run.log(point)


def log_result(run: Any, result: Result, samples: Mapping[str, Any]) -> None:
    """Everything of a finished evaluation but its files.

    Args:
        run: Of W&B.
        result: Its figures.
        samples: ``teacher`` and ``student`` ``[N, C, H, W]`` in [0, 1].
    """
    log_trajectory(run, result)
    run.log({COST_TABLE: cost_table(result), SAMPLE_TABLE: sample_table(samples, result.seed)})
    numbers = result.numbers()
    run.log(numbers)
    run.summary.update(numbers)


def log_trajectory(run: Any, result: Result) -> None:
    """Errors by time step: curves with the time step as their axis, and the table behind the heat map."""
    import numpy as np
    import wandb

    errors = result.errors
    if not errors:
        return
    matrix = np.array([[np.nan if v is None else v for v in row] for row in errors["operator_error"]], dtype=float)
    table = wandb.Table(columns=["operator", "timestep", "error"])
    for column, timestep in enumerate(errors["timesteps"]):
        point = {TIMESTEP: timestep, SAMPLE_ERROR: errors["sample_error"][column]}
        recorded = matrix[:, column][np.isfinite(matrix[:, column])] if matrix.size else np.array([])
        if recorded.size:
            point |= {OPERATOR_ERROR: float(np.median(recorded)), WORST_ERROR: float(recorded.max())}
        run.log(point)
        for row, name in enumerate(errors["operators"]):
            if np.isfinite(matrix[row, column]):
                table.add_data(name, timestep, float(matrix[row, column]))
    run.log({ERROR_TABLE: table})


def cost_table(result: Result) -> Any:
    """Cost by operator."""
    import wandb

    rows = [dict(row) for row in result.operators]
    columns = list(rows[0]) if rows else ["name"]
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])


def sample_table(samples: Mapping[str, Any], seed: int) -> Any:
    """Teacher and student side by side, of the same noise."""
    import wandb

    kinds = [kind for kind in ("teacher", "student") if kind in samples]
    table = wandb.Table(columns=["index", "seed", *kinds])
    for index in range(len(samples[kinds[0]]) if kinds else 0):
        table.add_data(index, seed, *(wandb.Image(to_pixels(samples[kind][index])) for kind in kinds))
    return table


def log_pictures(run: Any, folder: Path) -> None:
    """The pictures of a run's directory, as far as they are there."""
    import wandb

    found = {key: folder / f"{name}.png" for name, key in PICTURES.items()}
    run.log({key: wandb.Image(str(path)) for key, path in found.items() if path.is_file()})


def log_samples(run: Any, folder: Path) -> None:
    """The last picture of a training."""
    import wandb

    found = sorted(folder.glob("step_*.png"))
    if found:
        run.log({PICTURES["samples"]: wandb.Image(str(found[-1]))})


def log_artifacts(run: Any, folder: Path, module: Any, recipe: str, provenance: Mapping[str, Any]) -> None:
    """What the run used and what it made, so that W&B draws where a result comes from.

    Used: the teacher and, where there is one, the calibration, by their hashes. Made: recipe and figures, and the
    packed student.
    """
    import wandb

    name = recipe.replace("/", "-")
    teacher = wandb.Artifact(
        f"teacher-{_plain(module.spec.title)}", type="teacher", metadata={"weights": provenance.get("teacher_hash")}
    )
    with teacher.new_file("teacher.txt") as file:
        file.write(f"{module.spec.title}\n{provenance.get('teacher_hash')}\n")
    _use(run, teacher)
    if module.calibration is not None:
        origin = module.origin()["calibration"]
        calibration = wandb.Artifact(f"calibration-{name}", type="calibration", metadata=origin)
        with calibration.new_file("calibration.txt") as file:
            file.write("\n".join(f"{key}: {value}" for key, value in origin.items()) + "\n")
        _use(run, calibration)
    made = wandb.Artifact(f"result-{name}", type="result", metadata={"recipe_hash": provenance.get("recipe_hash")})
    for file_name in ("config.yaml", "metrics.json", "trajectory_errors.json", "cost.json", "report.html"):
        if (folder / file_name).is_file():
            made.add_file(str(folder / file_name), name=file_name)
    run.log_artifact(made)
    if module.student is not None:
        log_student(run, module, name)


def _use(run: Any, artifact: Any) -> None:
    """Say that the run used an artifact. Offline W&B has no public call for that, though its file has room for it."""
    if not run.offline:
        run.use_artifact(artifact)
    elif hasattr(run, "_log_artifact"):
        run._log_artifact(artifact, use_after_commit=True)


def log_student(run: Any, module: Any, name: str) -> None:
    """The packed student; its manifest alone where it is large."""
    import wandb

    from modiff.student.checkpoint import save

    with tempfile.TemporaryDirectory(prefix="modiff-") as made:
        target = Path(made) / "student"
        save(module.student, target, teacher=module.spec.title, origin=module.origin())
        size = sum(file.stat().st_size for file in target.iterdir()) / 2**20
        artifact = wandb.Artifact(f"student-{name}", type="student", metadata={"mib": size})
        for file in sorted(target.iterdir()):
            if size <= STUDENT_LIMIT_MIB or file.suffix == ".json":
                artifact.add_file(str(file), name=file.name)
        run.log_artifact(artifact)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
