"""Bit operations, memory, and the measured ratio of times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from modiff.lit.modules.student import LitStudent
from modiff.lit.report.result import Timing
from modiff.student.cost import cost
from modiff.trajectory.session import trajectory


class Cost(Callback):
    """Counts the cost of teacher and student, and times them against each other.

    Args:
        rounds: Interleaved rounds of timing; 0: no timing.
        evaluations: Evaluations of each in one round. The student's warm-up is not timed.
    """

    def __init__(self, rounds: int = 3, evaluations: int = 3) -> None:
        self.rounds = rounds
        self.evaluations = evaluations

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Count and time on rank 0, after all images have been drawn."""
        if not trainer.is_global_zero:
            return
        module, evaluations = pl_module, pl_module.result.evaluations
        assert module.teacher is not None
        assert module.student is not None
        assert evaluations is not None
        index, rows = torch.arange(1), module.rows_per_image  # costs are per row; guidance evaluates two for an image
        args, kwargs = module.inputs(module.noise(index), index)
        with module.in_precision():  # as the images were drawn
            student = cost(module.student, *args, evaluations=evaluations["total"], **kwargs)
            teacher = cost(module.teacher, *args, **kwargs)
        module.result.cost = {
            "gbops_per_evaluation": student.gbops_per_evaluation * rows,
            "teacher_gbops_per_evaluation": teacher.gbops_per_evaluation * rows,
            "container_gbops_per_evaluation": student.container_gbops_per_evaluation * rows,
            "other_gbops_per_evaluation": student.other_bops * rows / 1e9,
            "weight_mib": student.weight_mib,
            "teacher_weight_mib": teacher.weight_mib,
            "other_weight_mib": student.other_weight_bytes / 2**20,
            "state_mib_per_image": student.state_mib_per_image * rows,
        }
        module.result.operators = [
            {
                "name": row.name,
                "macs": row.macs * rows,
                "weight_bits": row.weight_bits,
                "activation_bits": row.activation_bits,
                "gbops": row.bops * rows / 1e9,
                "constant": row.constant,
                "weight_mib": row.weight_bytes / 2**20,
                "state_mib": row.state_bytes * rows / 2**20,
            }
            for row in student.operators
        ]
        if self.rounds > 0:
            with module.in_precision():  # as the images were drawn
                module.result.timing = self.time(module, trainer.datamodule.batch_size)  # type: ignore[attr-defined]

    def time(self, module: LitStudent, batch_size: int) -> Timing:
        """Median seconds per image and evaluation of both; they alternate, so that drift of the machine cancels."""
        assert module.teacher is not None
        assert module.student is not None
        indices = torch.arange(batch_size)
        x, teacher, student = (
            module.noise(indices),
            module.bind(module.teacher, indices),
            module.bind(module.student, indices),
        )
        seconds: dict[str, list[float]] = {"teacher": [], "student": []}
        teacher(x, 0)
        for _ in range(self.rounds):
            seconds["teacher"] += self._evaluate(teacher, x)
            with trajectory(module.student):
                student(x, 0)
                seconds["student"] += self._evaluate(student, x)
        median = {who: statistics.median(values) / batch_size for who, values in seconds.items()}
        return {"seconds_per_image_evaluation": median, "time_ratio": median["student"] / median["teacher"]}

    def _evaluate(self, denoiser: Callable[..., Any], x: torch.Tensor) -> list[float]:
        times = []
        for i in range(self.evaluations):
            start = time.perf_counter()
            denoiser(x * (1 - 0.01 * i), 0)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times.append(time.perf_counter() - start)
        return times
