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
    """Lightning's bars, and one more for the time steps of the batch being drawn."""

    _steps: Any = None

    def on_evaluation_end(self, step: int, total: int, who: str) -> None:
        """Advance the bar of time steps; ``step`` counts from 1."""
        if self.progress is None:
            return
        if self._steps is None:
            self._steps = self.progress.add_task("", total=total, visible=True)
        self.progress.update(self._steps, completed=step, total=total, description=f"{who}, time steps")
        self.progress.refresh()

    def _stop_progress(self) -> None:
        super()._stop_progress()
        self._steps = None


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

    def _say(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            print(f"[{now - self._start:6.0f} s] {text}", flush=True)
