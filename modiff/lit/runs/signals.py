"""The signals that ask a run to stop, and what they do before the work begins and after it is over.

It imports nothing but the standard library: a signal may come while everything else is still being imported.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
INTERRUPTED, REQUEUE = 130, 75


def asks_for_requeue(number: int) -> bool:
    """Whether a signal means that the job is to be started again."""
    requeue = number == getattr(signal, "SIGUSR1", None) or os.environ.get("MODIFF_REQUEUE") == "1"
    return requeue and number != signal.SIGINT


def leave_early(command: str) -> None:
    """Until the work takes signals over, let each of them end this process with its exit code and one line."""

    def leave(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        text = f"modiff {command}: interrupted by {name} before it began; the same command goes on.\n"
        os.write(2, text.encode())
        os._exit(REQUEUE if asks_for_requeue(number) else INTERRUPTED)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, leave)


def ignore_signals() -> None:
    """Ignore them until the process is gone: its exit code is decided, and nothing is left to interrupt."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
