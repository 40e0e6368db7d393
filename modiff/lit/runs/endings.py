"""The last seconds of a command: what it says, which exit code it has, and that no rank is left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from modiff.errors import ModiffError
from modiff.lit.runs.control import LOOK_S, Control, Interrupted, PeerLost, controlling
from modiff.lit.runs.signals import INTERRUPTED

OF_A_GROUP = re.compile(r"gloo|nccl|connection|socket|peer|store|broken pipe|timed? ?out", re.IGNORECASE)


def run_command(command: str, work: Callable[[], Any], last: bool = False) -> int:
    """Run a command; returns its exit code, and says in one line, on one rank, why it is not 0.

    Several ranks that do not end well leave without Python's own goodbye, in which they would wait for each other.

    Args:
        command: Its name.
        work: Does it; returns the exit code.
        last: The process ends with the command: signals that come after the work change nothing.
    """
    with controlling(end_now, last) as control:
        error: BaseException | None = None
        try:
            try:
                code = int(work() or 0)
            finally:
                control.over = True
        except (ModiffError, OSError, Interrupted, KeyboardInterrupt) as found:
            error, code = found, 1
        except BaseException as found:
            several = control.world_size > 1
            if several:
                traceback.print_exc()
            leave_together(control, found)
            if several:
                sys.stderr.flush()
                os._exit(1)
            raise
        error = leave_together(control, error)
        if error is not None:
            code = say(command, control, error)
        several = control.world_size > 1
    if error is not None and several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def say(command: str, control: Control, error: BaseException) -> int:
    """Print what ended a command, on the first rank that gets to it; returns the exit code."""
    goes_on = "the same command goes on where this one stopped"
    if isinstance(error, Interrupted):
        text, code = f"interrupted by {error.stop.why}; {goes_on}.", error.stop.code
    elif isinstance(error, KeyboardInterrupt):
        text, code = f"interrupted; {goes_on}.", INTERRUPTED
    elif isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        text, code = f"{os.strerror(error.errno) if error.errno else error}{where}.", 1
    else:
        text, code = str(error), 1
    if speaks(control):
        print(f"modiff {command}: {text}", file=sys.stderr, flush=True)
    return code


def speaks(control: Control) -> bool:
    """Whether this rank is the one that says how the run ended."""
    if control.world_size == 1 or control.peers is None:
        return control.world_size == 1 or control.rank == 0
    from modiff.lit.runs.peers import StoreLost

    try:
        return bool(control.peers.post("said", {"rank": control.rank})["rank"] == control.rank)
    except StoreLost:
        return control.rank == 1 or os.environ.get("LOCAL_RANK") == "0"


def explain(control: Control, error: Exception) -> None:
    """Wait for the reason of a broken collective, and end the work by that; other errors are left alone.

    Raises:
        Interrupted: The others stop because they were asked to.
        PeerLost: One of them was lost.
    """
    if control.world_size == 1 or not OF_A_GROUP.search(f"{type(error).__name__} {error}"):
        return
    for _ in range(30):
        control.check()
        threading.Event().wait(LOOK_S)
    control.check()


def leave_together(control: Control, error: BaseException | None) -> BaseException | None:
    """Wait for the other ranks: to end well together, or to learn that this one does not.

    Returns:
        The error, or the one that it turns out to be.
    """
    if control.world_size > 1 and error is None:
        error = _last_barrier(control)
    if control.world_size > 1 and error is not None:
        error = _tell(control, error)
    _reap(control, patient=error is None)
    return error


def _last_barrier(control: Control) -> BaseException | None:
    from torch import distributed

    control.wait()
    try:
        distributed.barrier()
    except RuntimeError as broken:
        try:
            explain(control, broken)
        except (Interrupted, PeerLost) as found:
            return found
        return PeerLost(f"The ranks did not end together: {str(broken).splitlines()[0]}")
    control.parted = True  # each may go now, and none is missed
    return None


def _tell(control: Control, error: BaseException) -> BaseException:
    from modiff.lit.runs.peers import StoreLost

    if control.stop is None and control.lost is None:
        speaks(control)  # its own words, not the others'
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        control.lose(control.rank, f"ended ({text})")
    peers, missing = control.peers, []
    with contextlib.suppress(StoreLost):
        for _ in range(control.limit):
            missing = [] if peers is None else [rank for rank in peers.ignorant() if rank != control.rank]
            if not missing or control.lost is not None and control.rank != 0:
                return error
            threading.Event().wait(LOOK_S / 4)
    if missing and isinstance(error, Interrupted) and control.rank == 0:
        steps = ", ".join(str(rank) for rank in missing)
        control.lost = f"Rank {steps} did not answer the request to stop ({error.stop.why})."
        control.lost_rank = missing[0]
        control.mark("failed")
        return PeerLost(control.lost)
    return error


def _reap(control: Control, patient: bool) -> None:
    """Wait for the ranks that Lightning started here; end those that do not end."""
    for process in _children(control):
        with contextlib.suppress(Exception):
            process.wait(timeout=60 if patient else 10)
    end_children(control)


def _children(control: Control) -> list[Any]:
    return list(getattr(control.launcher, "procs", ()))


def end_children(control: Control) -> None:
    """Kill what is left of them."""
    for process in _children(control):
        if process.poll() is None:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGKILL)


def end_now(control: Control) -> None:
    """End this process from beside its work, which did not end by itself in time."""
    stop = control.stop
    if stop is not None:
        text = (
            f"rank {control.rank} did not stop within {control.limit} s of {stop.why}; its last step: {control.where}. "
            "Finished batches are kept."
        )
    else:
        text = str(control.lost)
    control.mark("interrupted" if stop is not None else "failed")
    if stop is not None or speaks(control):
        print(f"modiff: {text}", file=sys.stderr, flush=True)
    end_children(control)
    sys.stdout.flush()
    os._exit(stop.code if stop is not None else 1)
