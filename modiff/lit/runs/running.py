"""What every command does around Lightning's work: one rank speaks, and a stop leaves a marked directory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.lit.callbacks.activation_cache import explain_out_of_memory
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.control import current
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.endings import explain


@contextmanager
def running(run: RunDirectory | None) -> Iterator[None]:
    """Around the work on an output directory: it stops at a step only, and the directory says how it ended."""
    control = current()
    with control.deferring(), nullcontext() if run is None else control.marking(run):
        control.check()
        try:
            yield
        except RuntimeError as error:
            explain(control, error)
            raise


def interruptible(trainer: Trainer, work: Callable[[], Any]) -> None:
    """Run Lightning's work; after Ctrl-C raise KeyboardInterrupt, where Lightning would exit."""
    handler, gradients = signal.getsignal(signal.SIGINT), torch.is_grad_enabled()
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
        if isinstance(module, LitStudent) and hasattr(data, "batch_size"):
            found = explain_out_of_memory(error, module, data.batch_size, current().where)
            if found is not None:
                raise found from error
        raise
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error
    finally:
        torch.set_grad_enabled(gradients)  # Lightning's loops leave them off where they do not end by themselves


def rank_zero(function: Callable[..., Any], *args: Any) -> None:
    """Call on rank 0 only, before there is a process group."""
    if rank_zero_only.rank in (None, 0):
        function(*args)
