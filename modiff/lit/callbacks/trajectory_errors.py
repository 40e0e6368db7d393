"""Errors along the trajectory, by time step and by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from modiff.lit.modules.student import LitStudent
from modiff.lit.report.result import TrajectoryErrorTable
from modiff.metrics.pairwise import mean_relative_l2
from modiff.student.swap import describe
from modiff.teachers.families import first_tensor
from modiff.trajectory.session import trajectory


class TrajectoryErrors(Callback):
    """Runs teacher and student side by side on a few samples and records their distance at every evaluation.

    Both follow their own trajectory from the same noise (closed loop). Errors are relative L2: mean over samples of
    ``||student - teacher|| / ||teacher||``, of x_t and of each operator's output.

    Args:
        num_images: Samples; a handful is enough for a picture.
    """

    def __init__(self, num_images: int = 4) -> None:
        self.num_images = num_images

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Measure on rank 0, after all images have been drawn."""
        if trainer.is_global_zero and self.num_images > 0:
            pl_module.result.errors = measure(pl_module, self.num_images)
            warning = explosion(pl_module.result.errors)
            if warning is not None:
                print(warning)


def explosion(errors: TrajectoryErrorTable) -> str | None:
    """Where the student leaves its teacher for good, in one line; None where it stays within its size.

    >>> explosion({"timesteps": [9, 5, 1], "sample_error": [0.1, 1.5, 40.0], "operators": [], "operator_error": []})
    'The student left its teacher: x_t is 150% away from it at time step 5 (evaluation 2 of 3), and 4000% at the end.'
    """
    found = errors["sample_error"]
    first = next((i for i, error in enumerate(found) if not error <= 1.0), None)  # NaN counts
    if first is None:
        return None
    return (
        f"The student left its teacher: x_t is {found[first]:.0%} away from it at time step "
        f"{errors['timesteps'][first]} (evaluation {first + 1} of {len(found)}), and {found[-1]:.0%} at the end."
    )


def measure(module: LitStudent, num_images: int) -> TrajectoryErrorTable:
    """Per-evaluation errors of samples 0 .. num_images - 1, as plain lists (noisiest evaluation first)."""
    assert module.student is not None
    names = [row.name for row in describe(module.student) if row.skipped is None]
    assert module.teacher is not None
    indices = torch.arange(num_images)
    bound = module.bind(module.teacher, indices), module.bind(module.student, indices)
    pair = _Pair(module.teacher, module.student, names, bound)
    timesteps: list[int] = []
    samples: list[Tensor] = []

    def on_evaluation(_: int, timestep: Any, x: Tensor) -> None:
        timesteps.append(int(timestep))
        teacher, student = x.chunk(2)
        samples.append(mean_relative_l2(student, teacher))

    with trajectory(module.student), pair.recording():
        module.denoise(pair, indices.repeat(2), on_evaluation)
    return {
        "timesteps": timesteps,
        "operators": names,
        "operator_error": pair.errors(),
        "sample_error": torch.stack(samples).tolist(),
    }


class _Pair:
    """Denoiser of a batch whose first half goes to the teacher and second half to the student, each in its own call."""

    def __init__(
        self, teacher: nn.Module, student: nn.Module, names: list[str], bound: tuple[Callable[..., Any], ...]
    ) -> None:
        self.teacher, self.student, self.names, self.bound = teacher, student, names, bound
        self._outputs: dict[str, list[Tensor]] = {}
        self._errors: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, timestep: Any) -> Tensor:
        self._outputs = {}
        self._errors.append({})
        outputs = [denoiser(part, timestep) for denoiser, part in zip(self.bound, x.chunk(2), strict=True)]
        return torch.cat([first_tensor(output) for output in outputs])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hook the operators of both denoisers while the block runs."""
        handles = []
        for name in self.names:
            handles.append(self.teacher.get_submodule(name).register_forward_hook(self._keep(name)))
            handles.append(self.student.get_submodule(name).register_forward_hook(self._compare(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs = {}

    def errors(self) -> list[list[float | None]]:
        """Errors by operator and evaluation; None where an operator did not run or its error is infinite."""
        return [[_finite(e.get(name)) for e in self._errors] for name in self.names]

    def _keep(self, name: str) -> Any:
        return lambda _, __, output: self._outputs.setdefault(name, []).append(output)

    def _compare(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if self._outputs.get(name):  # an operator used twice is compared call by call; its last call is shown
                self._errors[-1][name] = mean_relative_l2(output, self._outputs[name].pop(0))

        return hook


def _finite(error: Tensor | None) -> float | None:
    return float(error) if error is not None and bool(error.isfinite()) else None
