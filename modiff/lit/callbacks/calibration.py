"""The student's calibration, before anything is drawn: run once, cached by content hash, resumable."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from modiff.calibration import calibrate
from modiff.calibration.loop.reduction import Reducer, TorchReducer
from modiff.calibration.ranges.observe import with_dynamic_ranges
from modiff.errors import CalibrationError, CheckpointError
from modiff.lit.callbacks.activation_cache import refuse_overflow, state_of_one_image
from modiff.lit.callbacks.progress import duration
from modiff.lit.modules.calibration_config import NOISE_STREAM, CalibrationConfig
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.cache import calibration_key
from modiff.lit.runs.control import current
from modiff.lit.runs.running import rank_zero
from modiff.storage.cache import cache_folder
from modiff.storage.locks import locked
from modiff.student.checkpoint import load, save
from modiff.student.swap import quantize
from modiff.teachers.sampling.noise import indexed_noise
from modiff.trajectory.session import trajectory


class Calibration(Callback):
    """Calibrates the student where its recipe says so; a student that is calibrated already is left alone.

    Results are kept in ``<cache>/calibrations/<content hash>``: the hash is of the teacher's weights, the quantization,
    the calibration's settings and seed, the sampler, and the version of the algorithm. A finished calibration is used,
    and an interrupted one is resumed from its last finished stage. A cache that cannot be written costs one line, and
    the calibration is not kept.

    Args:
        cache: Folder of the cache; None: ``$MODIFF_CACHE``, else ``modiff`` in the user's cache directory.

    Raises:
        CalibrationError: See :func:`modiff.calibration.calibrate`; or what is kept is damaged.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self._done_before = 0
        self._start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Calibrate, or read what an earlier calibration found; every rank ends with the same bits."""
        if pl_module.calibrated or pl_module.student is None:
            return
        reducer = TorchReducer() if trainer.world_size > 1 else Reducer()
        key = calibration_key(calibration_parts(pl_module))
        # The first rank decides where: another one may see another cache, or none.
        cache = reducer.once(lambda: self.cache / "calibrations" if self.cache else cache_folder("calibrations"))
        folder = cache / key
        finished = folder / "student"
        with ExitStack() as stack:
            reducer.once(lambda: _enter(stack, folder))
            if reducer.once(finished.exists):
                pl_module.use_student(reducer.each(lambda: read_student(finished, pl_module, reducer)), calibrated=True)
                rank_zero(print, f"Calibration read from {finished}.")
            else:
                self._calibrate(trainer, pl_module, folder, reducer)

    on_predict_start = on_test_start

    def _calibrate(self, trainer: Trainer, module: LitStudent, folder: Path, reducer: Reducer) -> None:
        found, stages = module.calibration, folder / "stages"
        assert found is not None
        assert module.config is not None
        module.use_student(quantize(module.shared_copy(), with_dynamic_ranges(module.config)), calibrated=False)
        option = "--model.calibration.images_per_batch"
        refuse_overflow(state_of_one_image(module), found.images_per_batch, module.device, option)
        self._start, self._done_before = time.monotonic(), len(list(stages.glob("stage-*")))
        before = f" {self._done_before} stages were done before." if self._done_before else ""
        text = f"Calibrating by {found.method} on {found.num_images} images, once; kept in {folder}.{before}"
        rank_zero(print, text)

        def progress(done: int, total: int, what: str) -> None:
            tell(trainer, done, total, what, self._seconds_left(done, total))

        student = calibrate(
            module.shared_copy(),
            module.config,
            lambda student: draw(module, found, student, reducer.rank, reducer.world_size),
            found.method,
            found.seed,
            settings=found.settings,
            progress=progress,
            folder=stages,
            reducer=reducer,
        )
        reducer.once(lambda: _keep(student, folder, module))
        module.use_student(student, calibrated=True)
        rank_zero(print, f"Calibrated in {duration(time.monotonic() - self._start)}.")

    def _seconds_left(self, done: int, total: int) -> float | None:
        """Estimate from the stages that this process has finished; None before the first one."""
        own = done - self._done_before
        return (time.monotonic() - self._start) / own * (total - done) if own > 0 else None


def tell(trainer: Trainer, done: int, total: int, what: str, seconds_left: float | None) -> None:
    """Tell the callbacks how far the calibration is; if a stage holds many operators, name the first one."""
    current().step(f"calibration, {done} of {total} stages, {what[:60]}")
    first, *more = what.split(", ")
    what = f"{first} and {len(more)} more" if len(more) > 1 else what
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        hook = getattr(callback, "on_calibration_progress", None)
        if hook is not None:
            hook(done, total, what, seconds_left)


def read_student(folder: Path, module: LitStudent, reducer: Reducer) -> nn.Module:
    """A finished calibration; ranks that do not see the folder get its files from the first.

    Raises:
        CalibrationError: It is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="modiff-") as made:
        source = folder
        if not all(reducer.gather(folder.exists())):
            files = reducer.once(lambda: {file.name: file.read_bytes() for file in folder.iterdir()})
            if not folder.exists():
                source = Path(made)
                for name, content in files.items():
                    (source / name).write_bytes(content)
        try:
            return load(source, module.shared_copy())
        except CheckpointError as error:
            raise CalibrationError(
                f"The calibration in {folder} cannot be used: {error} Or delete {folder}."
            ) from error


def _enter(stack: ExitStack, folder: Path) -> None:
    line = f"Another process is at this calibration ({folder}); waiting for it."
    try:
        stack.enter_context(locked(folder, lambda: print(line, flush=True)))
    except OSError as error:
        raise CalibrationError(
            f"The cache of calibrations {folder} cannot be written: {error.strerror}. Set MODIFF_CACHE to another "
            "folder."
        ) from error


def _keep(student: nn.Module, folder: Path, module: LitStudent) -> None:
    try:
        save(student, folder / "student", teacher=module.spec.title, origin=module.origin())
    except CheckpointError as error:
        raise CalibrationError(f"The finished calibration cannot be kept: {error}") from error
    shutil.rmtree(folder / "stages", ignore_errors=True)


def draw(module: LitStudent, found: CalibrationConfig, student: nn.Module, rank: int = 0, world_size: int = 1) -> None:
    """Draw a rank's share of the calibration's images with a student; they are thrown away.

    A trajectory for each batch; batches are dealt to ranks in turn, and do not depend on their number.
    """

    def noise(indices: Tensor, stream: int) -> Tensor:
        rows = indexed_noise(found.seed, indices.tolist(), module.sample_shape, stream + NOISE_STREAM)
        return rows.to(module.device)

    for indices in torch.arange(found.num_images).split(found.images_per_batch)[rank::world_size]:
        with trajectory(student):
            bound = module.bind(student, indices)
            module.denoise(bound, indices, lambda i, *_: module.notify(i + 1, "calibration"), noise)


def calibration_parts(module: LitStudent) -> dict[str, Any]:
    """Everything that the result of a calibration depends on, except for the code."""
    found = module.calibration
    assert found is not None
    assert module.config is not None
    assert module.teacher is not None
    return {
        "teacher": module.teacher_hash,
        "dtype": str(next(module.teacher.parameters()).dtype),
        "config": dataclasses.asdict(module.config),
        "calibration": dataclasses.asdict(found),
        "sampling": [module.scheduler_name, module.steps, module.eta, module.guidance, module.spec.image_size],
        "conditions": module.conditions(list(range(found.num_images))),
    }
