"""Progress: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar


def progress_bar() -> Callback:
    """Rich bars where there is a terminal, a line now and then where there is none."""
    return EvaluationProgressBar() if sys.stdout.isatty() else LineProgress()


class EvaluationProgressBar(RichProgressBar):
    """Lightning's bars, one more for the time steps of the batch being drawn, and one for a calibration."""

    _steps: Any = None
    _calibration: Any = None

    def on_evaluation_end(self, step: int, total: int, who: str) -> None:
        """Advance the bar of time steps; ``step`` counts from 1."""
        if self.progress is None:
            return
        if self._steps is None:
            self._steps = self.progress.add_task("", total=total, visible=True)
        self.progress.update(self._steps, completed=step, total=total, description=f"{who}, time steps")
        self.progress.refresh()

    def on_calibration_progress(self, done: int, total: int, what: str, seconds_left: float | None) -> None:
        """Advance the calibration's bar; its last column is the time left."""
        if self.progress is None:
            return
        if self._calibration is None:
            self._calibration = self.progress.add_task("", total=total, visible=True)
        left = "" if seconds_left is None or done == total else f", about {duration(seconds_left)} left"
        self.progress.update(self._calibration, completed=done, total=total, description=f"calibration{left}")
        self.progress.refresh()

    def _stop_progress(self) -> None:
        super()._stop_progress()
        self._steps = self._calibration = None


class Pace:
    """How far the drawing is, and how fast; batches that were read from disk count as done, but not for the speed.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.batches = self.batch = self.images = self.calls = 0
        self._drawn = self._in_batch = 0
        self._start = clock()

    def begin(self, batches: int, images: int, calls: int) -> None:
        """Start: this rank's batches, the images of all ranks, and the denoiser calls of one batch."""
        self.batches, self.images, self.calls = batches, images, calls
        self._start = self.clock()

    def call(self) -> None:
        """A denoiser call begins."""
        self._drawn += 1
        self._in_batch = min(self._in_batch + 1, self.calls)

    def end_batch(self) -> None:
        """A batch is done, drawn or read."""
        self.batch, self._in_batch = self.batch + 1, 0

    @property
    def images_per_s(self) -> float:
        """Images of all ranks together that are drawn in a second; 0 before the first call."""
        seconds = self.clock() - self._start
        whole = self.batches * self.calls
        return self._drawn / whole * self.images / seconds if whole and seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """For the batches that are left, at that speed; None before the first call."""
        left = self.batches * self.calls - self.batch * self.calls - self._in_batch
        return (self.clock() - self._start) / self._drawn * max(0, left) if self._drawn else None


def begin_pace(pace: Pace, trainer: Trainer, module: Any) -> None:
    """Set a pace to the run that begins."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "num_images"):
        return
    rounds = -(-data.num_images // (data.batch_size * trainer.world_size))
    both = trainer.state.fn == "test" and module.student is not None
    pace.begin(rounds, data.num_images, module.steps * (2 if both else 1))


class LineProgress(ProgressBar):
    """One line every few seconds, for logs.

    Args:
        every_s: Seconds between lines.
    """

    def __init__(self, every_s: float = 15.0) -> None:
        super().__init__()
        self.every_s = every_s
        self.pace = Pace()
        self._who = ""
        self._last = self._start = time.monotonic()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock of the images."""
        super().on_test_start(trainer, pl_module)
        self._who = f" rank {trainer.global_rank} of {trainer.world_size}" if trainer.world_size > 1 else ""
        begin_pace(self.pace, trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock of the images."""
        super().on_predict_start(trainer, pl_module)
        self._who = f" rank {trainer.global_rank} of {trainer.world_size}" if trainer.world_size > 1 else ""
        begin_pace(self.pace, trainer, pl_module)

    def on_test_batch_end(self, *args: Any) -> None:
        """Count the batch."""
        super().on_test_batch_end(*args)
        self.pace.end_batch()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Count the batch."""
        super().on_predict_batch_end(*args)
        self.pace.end_batch()

    def disable(self) -> None:
        """Print nothing from now on (ranks other than 0)."""
        self.every_s = float("inf")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # type: ignore[override]
        """Print the step and the loss."""
        super().on_train_batch_end(trainer, *args)
        if time.monotonic() - self._last < self.every_s:
            return  # reading the loss waits for the device
        loss = trainer.progress_bar_metrics.get("train/loss", float("nan"))
        self._say(f"step {trainer.global_step}, loss {loss:.4f}")

    def on_evaluation_end(self, step: int, total: int, who: str) -> None:
        """Print the batch, the time step, the speed and the time left."""
        if who == "calibration":
            self._say(f"calibration: time step {step} of {total}")
            return
        self.pace.call()
        pace, left = self.pace, self.pace.seconds_left
        speed = f"{pace.images_per_s:.3g} images/s" + ("" if left is None else f", about {duration(left)} left")
        self._say(f"batch {pace.batch + 1} of {pace.batches}, {who}, time step {step} of {total}; {speed}")

    def on_calibration_progress(self, done: int, total: int, what: str, seconds_left: float | None) -> None:
        """Print how far the calibration is, and the time left."""
        left = "" if seconds_left is None or done == total else f", about {duration(seconds_left)} left"
        self._say(f"calibration: {done} of {total} done ({what}){left}")

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            print(f"[{now - self._start:6.0f} s{self._who}] {text}", flush=True)


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(7.4), duration(125), duration(7260)
    ('7 s', '2 min 5 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
