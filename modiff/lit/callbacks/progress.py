"""Progress: bars on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
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


class LineProgress(ProgressBar):
    """One line every few seconds, for logs.

    Args:
        every_s: Seconds between lines.
    """

    def __init__(self, every_s: float = 15.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._last = self._start = time.monotonic()

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
        """Print the time step."""
        self._say(f"{who}: time step {step} of {total}")

    def on_calibration_progress(self, done: int, total: int, what: str, seconds_left: float | None) -> None:
        """Print how far the calibration is, and the time left."""
        left = "" if seconds_left is None or done == total else f", about {duration(seconds_left)} left"
        self._say(f"calibration: {done} of {total} done ({what}){left}")

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            print(f"[{now - self._start:6.0f} s] {text}", flush=True)


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
