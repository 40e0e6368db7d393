"""``modiff quantize``: the packed student of a recipe, calibrated where the recipe says so."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.callbacks.calibration import Calibration
from modiff.lit.cli.student import StudentCLI
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.running import interruptible, rank_zero, running
from modiff.lit.runs.wandb import Guarded, finish_wandb, make_wandb_logger
from modiff.lit.runs.wandb_content import log_student
from modiff.storage.folder import check_target, read_manifest
from modiff.student.checkpoint import save
from modiff.student.swap import RECORD


def quantize(args: Sequence[str]) -> int:
    """``modiff quantize``: pack the student of a recipe into ``--output``, for ``--ckpt`` or ``modiff.load``."""
    cli = StudentCLI("quantize", args)
    if cli.config.ckpt is not None:
        raise ConfigError("modiff quantize makes a checkpoint and takes none. Remove --ckpt.")
    if cli.model.config is None:
        raise ConfigError("Nothing is quantized: give --model.preset, for example w4a4-modiff, or --model.config.")
    module = cli.prepare_model()
    folder = Path(cli.config.output or Path("runs") / cli.recipe / "student")
    if not cli.config.overwrite and made_before(folder, module):
        rank_zero(print, f"{folder} holds this very student; nothing to do (--overwrite true repeats it).")
        return 0
    rank_zero(check_target, folder, cli.config.overwrite)  # before a calibration of minutes, not after
    pack = Pack(folder, cli.config.overwrite, cli.config.remainder_dtype)
    if module.calibrated:
        rank_zero(pack.write, module)
        return 0
    with running(None):
        logs = folder.with_name(f"{folder.name}-logs")
        logger = make_wandb_logger(cli.config.wandb, logs, cli.recipe, cli.identity(), None, "quantize")
        trainer = cli.make_trainer([Calibration(), pack], logger=logger or False)
        try:
            interruptible(trainer, lambda: trainer.predict(module, DataLoader(Nothing()), return_predictions=False))
            name = cli.recipe.replace("/", "-")
            Guarded(logger, folder)(lambda run: log_student(run, module, name))
        finally:
            finish_wandb(logger, int(sys.exc_info()[0] is not None))
    return 0


def made_before(folder: Path, module: LitStudent) -> bool:
    """Whether a folder holds the student that this recipe makes."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    # A student's own config names the operators that its vectors and ends turned out to be.
    configs = [module.config, *([getattr(module.student, RECORD).config] if module.student is not None else [])]
    wanted = json.loads(json.dumps([dataclasses.asdict(config) for config in configs]))  # type: ignore[arg-type]
    origin = json.loads(json.dumps(module.origin()))
    return manifest.get("quant_config") in wanted and manifest.get("origin") == origin


class Nothing(IterableDataset):
    """A data set without a batch: the Trainer starts, its callbacks calibrate and pack, and nothing is drawn."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


class Pack(Callback):
    """Writes the student into a folder once it is calibrated, on rank 0.

    Args:
        folder: Gets ``config.json`` and ``model.safetensors``.
        overwrite: A checkpoint that lies there may be replaced.
        dtype: Of what is not quantized; None: as it is.
    """

    def __init__(self, folder: Path, overwrite: bool = False, dtype: str | None = None) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.dtype = dtype

    def on_predict_start(self, trainer: Trainer, pl_module: LitStudent) -> None:
        """Write the student, which the callback ``Calibration`` before this one has calibrated."""
        if trainer.is_global_zero:
            self.write(pl_module)

    def write(self, module: LitStudent) -> None:
        """Save the student and say how to use it."""
        assert module.student is not None
        facts = {"teacher": module.spec.title, "origin": module.origin()}
        save(module.student, self.folder, dtype=self.dtype, overwrite=self.overwrite, **facts)
        stored = sum(file.stat().st_size for file in self.folder.iterdir()) / 2**20
        use = f"modiff evaluate --ckpt {self.folder}, or modiff.load({str(self.folder)!r}, denoiser)"
        print(f"{self.folder}: {stored:.2f} MiB. Use it: {use}.")
