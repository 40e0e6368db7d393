"""All ranks stop at the same place, and all of them see the same output directory."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import distributed

from modiff.errors import ConfigError
from modiff.lit.runs.control import LAUNCHER_PID, current

TOKEN_WAIT_S = 20.0


class OwnSignals(_SignalConnector):
    """Leaves signals to :mod:`modiff.lit.runs.control`: Lightning's handler talks to other ranks, and hangs."""

    def register_signal_handlers(self) -> None:
        """Change nothing."""

    def teardown(self) -> None:
        """Change nothing."""


def own_signals(trainer: Trainer) -> Trainer:
    """Take signals, and the ranks that Lightning starts, over from a Trainer."""
    trainer._signal_connector = OwnSignals(trainer)
    launcher, control = trainer.strategy.launcher, current()
    if isinstance(launcher, _SubprocessScriptLauncher) and not getattr(control.launcher, "procs", None):
        control.launcher = launcher
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[LAUNCHER_PID] = str(os.getpid())
    return trainer


def keep_order_of_sums(trainer: Trainer) -> Trainer:
    """Let the ranks add their gradients up in the same order in every step.

    After its first step DDP puts the gradients into other buckets, in the order in which they came. The sum of three
    ranks or more is rounded by its place in a bucket, so that a training that goes on, whose first step is a later one,
    would end with other bits. Looking for unused parameters, DDP leaves the buckets as they are.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
    return trainer


class Agreement(Callback):
    """Ends a run where it was asked for: sampling at a time step, training with a checkpoint at the end of a batch.

    It comes last in the Trainer's list, so that averages of the step are taken before its checkpoint is written.

    Args:
        output: Directory that all ranks write to; None: none of them does.
    """

    def __init__(self, output: str | os.PathLike[str] | None = None) -> None:
        self.output = None if output is None else Path(output)
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check that the output directory is shared, before any image is drawn; make a group for the question."""
        control = current()
        if trainer.world_size > 1 and distributed.is_initialized():
            if self.output is not None:
                refuse_separate_folders(self.output, trainer.global_rank, trainer.world_size)
            if stage == "fit":  # on the CPU, so that no device waits for the answer
                self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=120))
        control.step("setup")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Say where training is."""
        self._tell(f"training step {trainer.global_step + 1}")

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Any) -> None:
        """Say where training is."""
        self._tell(f"training step {trainer.global_step + 1}, backward")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Ask all ranks whether one was asked to stop; then write a checkpoint and stop."""
        control = current()
        asked = control.stop is not None
        if self._group is not None:
            votes = torch.tensor([int(asked)], dtype=torch.int32)
            distributed.all_reduce(votes, distributed.ReduceOp.MAX, group=self._group)
            asked = bool(votes.item())
        if (
            asked or 0 < trainer.max_steps <= trainer.global_step
        ):  # the last step's is what a longer training goes on from
            keep_checkpoint(trainer)
        if not asked:
            return
        for _ in range(100):  # the reason may come a moment after the vote
            control.check()
            time.sleep(0.1)

    def on_validation_batch_start(self, *_: Any) -> None:
        """A stop during a validation ends it there; training goes on from the last checkpoint."""
        current().step("validation")

    def on_test_epoch_end(self, *_: Any) -> None:
        """This rank's images are done."""
        current().wait()

    on_predict_epoch_end = on_test_epoch_end

    def _tell(self, where: str) -> None:
        control = current()
        control.where, control.waiting = where, False
        control._steps += 1
        if control.lost is not None:
            control.check()


def keep_checkpoint(trainer: Trainer) -> None:
    """Write the checkpoint that the next start goes on from, on all ranks at the same step."""
    folder = next((c.dirpath for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)), None)
    if folder is not None:
        trainer.save_checkpoint(Path(folder) / "last.ckpt")


def refuse_separate_folders(folder: Path, rank: int, world_size: int) -> None:
    """Let every rank read a token that rank 0 writes.

    Raises:
        ConfigError: A rank does not see it: the folder lies on the disk of one machine.
    """
    token = [uuid.uuid4().hex]
    distributed.broadcast_object_list(token, src=0)
    path, seen = folder / f".token-{token[0]}", False
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(token[0])
    distributed.barrier()
    end = time.monotonic() + TOKEN_WAIT_S
    while not seen and time.monotonic() < end:
        seen = folder.is_dir() and path.name in os.listdir(folder)  # a list, which network folders do not remember
        if not seen:
            time.sleep(0.5)
    facts: list[Any] = [None] * world_size
    distributed.all_gather_object(facts, (seen, os.uname().nodename))
    if rank == 0:
        path.unlink(missing_ok=True)
    blind = [f"{number} on {host}" for number, (found, host) in enumerate(facts) if not found]
    if blind:
        raise ConfigError(
            f"--output {folder} is not shared: rank {', '.join(blind[:3])} does not see what rank 0 on {facts[0][1]} "
            "wrote there. Give a folder that all machines share."
        )
