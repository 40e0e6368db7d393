"""``modiff quantize``: the packed student of a recipe, calibrated where the recipe says so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

from modiff.errors import ConfigError
from modiff.lit.callbacks.calibration import Calibration
from modiff.lit.cli.student import StudentCLI
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.running import interruptible, rank_zero
from modiff.storage.folder import check_target
from modiff.student.checkpoint import save


def quantize(args: Sequence[str]) -> int:
    """``modiff quantize``: pack the student of a recipe into ``--output``, for ``--ckpt`` or ``modiff.load``."""
    cli = StudentCLI("quantize", args)
    if cli.config.ckpt is not None:
        raise ConfigError("modiff quantize makes a checkpoint and takes none. Remove --ckpt.")
    if cli.model.config is None:
        raise ConfigError("Nothing is quantized: give --model.preset, for example w4a4-modiff, or --model.config.")
    module = cli.prepare_model()
    folder = Path(cli.config.output or Path("runs") / cli.recipe / "student")
    rank_zero(check_target, folder, cli.config.overwrite)  # before a calibration of minutes, not after
    pack = Pack(folder, cli.config.overwrite, cli.config.remainder_dtype)
    if module.calibrated:
        rank_zero(pack.write, module)
        return 0
    trainer = cli.make_trainer([Calibration(), pack], logger=False)
    interruptible(None, trainer, lambda: trainer.predict(module, DataLoader(Nothing()), return_predictions=False))
    return 0


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
