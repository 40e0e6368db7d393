"""How far a run is, for people who look from outside: ``status.json``, and W&B's live progress."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from modiff.lit.callbacks.progress import Pace, begin_pace
from modiff.lit.runs.control import current
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.wandb import Guarded
from modiff.lit.runs.wandb_content import define_axes, log_progress


class Status(Callback):
    """Writes, on rank 0, what is done, how fast, and how long the rest takes; no more often than every few seconds.

    Args:
        run: The output directory.
        guarded: W&B.
        every_s: Seconds between two writings.
    """

    def __init__(self, run: RunDirectory, guarded: Guarded | None = None, every_s: float = 10.0) -> None:
        self.run, self.guarded, self.every_s = run, guarded, every_s
        self.pace = Pace()
        self._last = float("-inf")

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        begin_pace(self.pace, trainer, pl_module)
        self._write(trainer, pl_module)

    on_predict_start = on_test_start

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Count the batch."""
        self.pace.end_batch()
        self._write_sometimes(trainer, pl_module)

    on_predict_batch_end = on_test_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """All images are drawn."""
        self._write(trainer, pl_module)

    on_predict_epoch_end = on_test_epoch_end

    def on_evaluation_end(self, step: int, total: int, who: str) -> None:
        """A denoiser call, of the images or of the calibration."""
        if who != "calibration":
            self.pace.call()
        self._write_sometimes(self._trainer, self._module)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give W&B's curves their axes."""
        self._trainer, self._module = trainer, pl_module
        if self.guarded is not None and trainer.is_global_zero:
            self.guarded(define_axes)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Training counts in steps."""
        if trainer.is_global_zero and time.monotonic() - self._last >= self.every_s:
            self._last = time.monotonic()
            loss = trainer.callback_metrics.get("train/loss")
            facts = {"done": trainer.global_step, "total": trainer.max_steps, "unit": "steps"}
            self.run.report(**facts, loss=None if loss is None else float(loss), where=current().where)

    def _write_sometimes(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and time.monotonic() - self._last >= self.every_s:
            self._write(trainer, module)

    def _write(self, trainer: Trainer, module: Any) -> None:
        if not trainer.is_global_zero or not self.pace.images or module.store is None:
            return
        self._last = time.monotonic()
        size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        done = min(self.pace.images, module.store.count() * size)
        rate, left = self.pace.images_per_s, self.pace.seconds_left
        facts = {"done": done, "total": self.pace.images, "unit": "images", "images_per_s": rate, "seconds_left": left}
        self.run.report(**facts, world_size=trainer.world_size, where=current().where)
        if self.guarded is not None:
            self.guarded(lambda run: log_progress(run, done, rate, left))
