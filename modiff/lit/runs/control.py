"""How a run ends before it is done: signals, lost ranks and stalls, agreed on by all ranks and within a limit.

Handlers only take a note. The work asks at every time step (:meth:`Control.step`) and ends there; a thread beside it
passes the note on to the other ranks, watches them, and ends the process where the work does not get to ask.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol

from modiff.errors import ModiffError
from modiff.lit.runs.signals import INTERRUPTED, REQUEUE, SIGNALS, asks_for_requeue, ignore_signals

LOOK_S = 1.0
LAUNCHER_PID = "MODIFF_LAUNCHER_PID"
"""Variable by which ranks that Lightning starts know the process that started them."""


class Run(Protocol):
    """A directory that says how the work on it ended, such as :class:`modiff.lit.runs.directory.RunDirectory`."""

    claimed: bool

    @property
    def status(self) -> str | None:
        """What it says: running, interrupted, failed or complete."""

    def mark(self, status: str) -> None:
        """Let it say so."""


@dataclass(frozen=True)
class Stop:
    """A request to stop.

    Args:
        why: In words, such as ``SIGTERM to rank 1``.
        requeue: Whether the job is to be started again: exit code 75 instead of 130.
    """

    why: str
    requeue: bool = False

    @property
    def code(self) -> int:
        """The exit code."""
        return REQUEUE if self.requeue else INTERRUPTED


class Interrupted(BaseException):
    """The run stops because it was asked to; like KeyboardInterrupt it is no error."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.why)
        self.stop = stop


class InterruptedAtOnce(Interrupted, KeyboardInterrupt):
    """The same outside of Lightning's loops, wherever the work is: commands without a Trainer expect Ctrl-C there."""


class PeerLost(ModiffError):
    """Another rank ended or does not move; the message names it."""


class Control:
    """Signals, ranks and limits of one command.

    Args:
        limit: Looks, about a second each, that the work has to end once a stop is known.
        stall: Looks without a step of the work after which a rank counts as stalled.
        end: Ends the process where the work does not end by itself in time.
        last: The process ends with this command: signals are ignored from its end on.
    """

    def __init__(
        self,
        limit: int | None = None,
        stall: int | None = None,
        end: Callable[[Control], Any] | None = None,
        last: bool = False,
    ) -> None:
        self.end, self.last = end, last
        self.limit = limit or int(os.environ.get("MODIFF_STOP_SECONDS", "20"))
        self.stall = stall or int(os.environ.get("MODIFF_STALL_SECONDS", "1800"))
        self.stop: Stop | None = None
        self.lost: str | None = None
        self.lost_rank: int | None = None
        self.where = "starting"
        self.runs: list[Run] = []
        self.marked: list[Run] = []
        self.launcher: Any = None
        self.deferred = self._open = 0
        self.over = self.finished = self.parted = False
        self.peers: Any = None
        self.waiting = False
        self._steps = self._still = 0
        self._signals = 0
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None

    # What the work calls

    def step(self, where: str) -> None:
        """Say where the work is; end it here where that was asked for.

        Raises:
            Interrupted: A signal asked for it, here or at another rank.
            PeerLost: Another rank was lost.
        """
        self.where, self.waiting = where, False
        self._steps += 1
        self.check()

    def wait(self, where: str = "waiting for the other ranks") -> None:
        """Say that this rank's work is done for now: it may stand still as long as another's goes on."""
        self.where, self.waiting = where, True

    def check(self) -> None:
        """End the work here where that was asked for; see :meth:`step`."""
        if self.stop is not None:
            raise Interrupted(self.stop)
        if self.lost is not None:
            raise PeerLost(self.lost)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """While this is open a signal ends the work at its next step, and not wherever it is."""
        with self._working():
            self.deferred += 1
            try:
                yield
            finally:
                self.over = self._open == 1  # before signals would end the work wherever it is
                self.deferred -= 1

    @contextmanager
    def marking(self, run: Run) -> Iterator[None]:
        """Mark a run as interrupted or failed where the work in here ends so."""
        with self._working():
            self.runs.append(run)
            try:
                yield
            except BaseException as error:
                self.over = len(self.runs) == 1
                self.mark("interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed")
                raise
            finally:
                self.runs.remove(run)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """The outermost of these is the work: once it has ended, signals change nothing any more."""
        self._open, self.over = self._open + 1, False
        try:
            yield
        finally:
            self.over = self._open == 1
            self._open -= 1

    def mark(self, status: str) -> None:
        """Mark the open runs, but for complete ones: by rank 0, or where that was lost by the next one."""
        if self.rank == (1 if self.lost_rank == 0 else 0):
            self.marked += self.runs
            for run in self.runs or self.marked:
                if (self.rank == 0 and not run.claimed) or run.status == "complete":
                    continue  # it was refused: what lies there is another's; or it is whole
                with contextlib.suppress(OSError):
                    run.mark(status)

    @property
    def rank(self) -> int:
        """Of this process."""
        module = sys.modules.get("lightning.pytorch.utilities.rank_zero")
        return int(module.rank_zero_only.rank or 0) if module is not None else 0

    @property
    def world_size(self) -> int:
        """Ranks of the process group; 1 where there is none yet."""
        module: Any = sys.modules.get("torch.distributed")
        grouped = module is not None and module.is_available() and module.is_initialized()
        return int(module.get_world_size()) if grouped else 1

    # From the first line of a command to its last

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():
            self._wakeup = socket.socketpair()
            for end in self._wakeup:
                end.setblocking(False)
            signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="modiff-control")
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.finished = True
        if self._thread is not None:
            if self._wakeup is not None:
                self._wakeup[1].send(b"\0")
            self._thread.join(timeout=3 * LOOK_S)
        if self._wakeup is not None:
            if self.last:
                ignore_signals()  # and never restored in between: until it is gone, the process can get one
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                if not self.last:
                    signal.signal(number, handler)
            for end in self._wakeup:
                end.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.over:
            return
        self._signals += 1
        self._ask(number)
        if number == signal.SIGINT and self._signals > 1:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait for anything
        # Before the first step there is nothing to finish, and the other ranks may be long in coming.
        if self._signals == 1 and not (self.deferred and self._steps):
            assert self.stop is not None
            raise (Interrupted if self.deferred else InterruptedAtOnce)(self.stop)

    def _ask(self, number: int) -> None:
        if self.stop is None and not self.over:
            to = f" to rank {self.rank}" if self.world_size > 1 else ""
            self.stop = Stop(f"{signal.Signals(number).name}{to}", asks_for_requeue(number))

    # The thread beside the work

    def _watch(self) -> None:
        looks_left, steps = self.limit, -1
        parent = parent_process()
        while not self.finished:
            self._wait()
            if self.finished:
                return
            steps, self._still = self._steps, self._still + 1 if steps == self._steps else 0
            if self.parted:
                continue
            self._look_at_children()
            self._look_at_peers()
            if parent is not None and os.getppid() != parent and self.stop is None and not self.over:
                self.stop = Stop("the end of its launcher")
            if self.lost is None and self.deferred and self._still >= self.stall and not self.waiting:
                self._stalled()
            if self.stop is not None or self.lost is not None:
                looks_left -= 1 if self.stop is not None else 4
                if looks_left <= 0 and self.end is not None:
                    self.end(self)

    def _wait(self) -> None:
        if self._wakeup is None:
            threading.Event().wait(LOOK_S)
            return
        ready, _, _ = select.select([self._wakeup[0]], [], [], LOOK_S)
        if ready:
            with contextlib.suppress(BlockingIOError):
                for number in self._wakeup[0].recv(64):
                    if number in SIGNALS:
                        self._ask(number)

    def _look_at_children(self) -> None:
        """The ranks that Lightning started on this node: their end is seen at once."""
        for local, process in enumerate(getattr(self.launcher, "procs", ()), start=1):
            code = process.poll()
            if code in (INTERRUPTED, REQUEUE) and self.stop is None and self.lost is None:
                self.stop = Stop(f"a signal to local rank {local}", code == REQUEUE)  # before it joined the others
            elif code and self.stop is None and self.lost is None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                base = self.rank - self.rank % (len(self.launcher.procs) + 1)
                self.lose(base + local, how)
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":  # Lightning's, which would kill this process without a word
                thread._child_processes = []  # type: ignore[attr-defined]

    def _look_at_peers(self) -> None:
        if self.world_size == 1:
            return
        from modiff.lit.runs.peers import Peers, StoreLost

        try:
            if self.peers is None:
                self.peers = Peers(self.rank, self.world_size)
            peers = self.peers
            peers.beat(self._steps, self._still, self.where)
            if self.stop is not None:
                peers.post("stop", asdict(self.stop))
            elif not self.over and (stop := peers.read("stop")) is not None:
                self.stop = Stop(**stop)
            if self.lost is None and (lost := peers.read("lost")) is not None:
                self.lost_rank, self.lost = lost["rank"], lost["text"]
            if self.stop is not None or self.lost is not None:
                peers.acknowledge()
            elif peers.neighbor_is_lost():
                self.lose(peers.neighbor, "does not answer")
        except StoreLost:
            if self.stop is None and self.lost is None and not self.finished:
                self.lost_rank = 0
                self.lost = "Rank 0, or the launcher, ended: nobody answers for it."

    def _stalled(self) -> None:
        """Of the ranks that stand still, the one that got least far is why."""
        still = [(self._steps, self.rank)]
        if self.peers is not None:
            found = [(*self.peers.where(rank), rank) for rank in range(self.world_size)]
            still += [(steps, rank) for steps, looks, _, rank in found if looks >= self.stall - 5]
        self.lose(min(still)[1], f"has not moved for {self._still} s")

    def lose(self, rank: int, how: str) -> None:
        """Take note of a lost rank, and tell the others."""
        from modiff.lit.runs.peers import StoreLost

        where = self.where
        with contextlib.suppress(StoreLost):
            if self.peers is not None and rank != self.rank:
                where = self.peers.where(rank)[2]
        text = f"Rank {rank} {how}; its last step: {where}."
        with contextlib.suppress(StoreLost):
            if self.peers is not None:
                found = self.peers.post("lost", {"rank": rank, "text": text})
                rank, text = found["rank"], found["text"]
        self.lost_rank, self.lost = rank, text


def is_child() -> bool:
    """Whether a launcher on this machine is this process's parent, so that nobody waits for it after its end."""
    by_lightning = "LOCAL_RANK" in os.environ and os.environ["LOCAL_RANK"] != "0" and "SLURM_PROCID" not in os.environ
    return by_lightning or "TORCHELASTIC_RUN_ID" in os.environ


def parent_process() -> int | None:
    """The launcher to watch, or None; it may have ended already, while this process was still importing."""
    if not is_child():
        return None
    known = os.environ.get(LAUNCHER_PID) if "TORCHELASTIC_RUN_ID" not in os.environ else None
    return int(known) if known else os.getppid()


_current = Control()


def current() -> Control:
    """The control of the command that runs in this process."""
    return _current


def stopping(what: str, then: Callable[..., Any] | None = None) -> Callable[..., None]:
    """A sampler's ``on_evaluation``: it ends the work there where that was asked for, else calls ``then``."""
    control = current()

    def step(number: int, timestep: Any, x: Any) -> None:
        control.step(f"{what}, evaluation {number + 1}, time step {int(timestep)}")
        if then is not None:
            then(number, timestep, x)

    return step


@contextmanager
def controlling(end: Callable[[Control], Any] | None = None, last: bool = False) -> Iterator[Control]:
    """A control of its own for one command; ``end`` and ``last`` as for :class:`Control`."""
    global _current
    before, _current = _current, Control(end=end, last=last)
    try:
        with _current:
            yield _current
    finally:
        _current = before
