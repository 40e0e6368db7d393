"""What every command does around Lightning's work: one rank speaks, Ctrl-C leaves a marked directory."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.lit.runs.directory import RunDirectory


def interruptible(run: RunDirectory | None, trainer: Trainer, work: Callable[[], Any]) -> None:
    """Run; after Ctrl-C mark the partial output, if any, as such and raise KeyboardInterrupt (Lightning would exit)."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        work()
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        if run is not None:
            rank_zero(run.mark, "interrupted")
        raise KeyboardInterrupt from error


def rank_zero(function: Callable[..., Any], *args: Any) -> None:
    """Call on rank 0 only, before there is a process group."""
    if rank_zero_only.rank in (None, 0):
        function(*args)
