"""Marks the steps of a sampler by its scheduler, while a pipeline is called.

The scheduler is an object of the caller's, which other pipelines and other threads may hold: neither it nor its class's
name, identity or pickle may change. So the functions ``step`` of its class are replaced while anybody samples, and tell
the trajectories of the thread in which they are called. A method put on the instance would be lost, or act on the
wrong scheduler, where a pipeline copies its scheduler.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from modiff.trajectory.contexts import Trajectory

_LOCK = threading.RLock()


class _Here(threading.local):
    """Trajectories of this thread, by class of the scheduler that marks their steps."""

    def __init__(self) -> None:
        self.runs: list[tuple[type, list[Trajectory]]] = []


_HERE = _Here()


@dataclass
class _Marked:
    """A class of schedulers whose functions are replaced.

    Args:
        calls: Pipelines that are being called.
        own: The functions that stood on the class itself.
        added: Names under which it had inherited ones.
    """

    calls: int = 0
    own: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)


_MARKED: dict[type, _Marked] = {}


@contextmanager
def marking_steps(scheduler: Any, runs: list[Trajectory]) -> Iterator[None]:
    """Have each step of a scheduler of this class, taken in this thread, mark the end of a step of trajectories."""
    cls = type(scheduler)
    with _LOCK:
        marked = _MARKED.setdefault(cls, _Marked())
        marked.calls += 1
        if marked.calls == 1:
            _replace(cls, marked)
    _HERE.runs.append((cls, runs))
    try:
        yield
    finally:
        _HERE.runs.remove((cls, runs))
        with _LOCK:
            marked.calls -= 1
            if not marked.calls:
                _put_back(cls, _MARKED.pop(cls))


def _replace(cls: type, marked: _Marked) -> None:
    for name in [n for n in dir(cls) if n == "step" or n.startswith("step_")]:
        original = getattr(cls, name)
        if not callable(original):
            continue
        if name in vars(cls):
            marked.own[name] = vars(cls)[name]
        else:
            marked.added.append(name)
        setattr(cls, name, _marking(cls, original))


def _put_back(cls: type, marked: _Marked) -> None:
    for name, original in marked.own.items():
        setattr(cls, name, original)
    for name in marked.added:
        delattr(cls, name)


def _marking(cls: type, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        for run in [run for marks, runs in _HERE.runs if issubclass(cls, marks) for run in runs]:
            if not run.closed:
                run.end_step()
        return original(self, *args, **kwargs)

    return step
