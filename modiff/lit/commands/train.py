"""``modiff train``: a small teacher, or the classifier that measures its images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.callbacks.training_samples import TrainingDistance, TrainingSamples
from modiff.lit.cli.base import ModiffCLI
from modiff.lit.data.images import ImageDataModule
from modiff.lit.runs.running import interruptible, rank_zero
from modiff.storage.atomic import write_text


class TrainCLI(ModiffCLI):
    """``modiff train``: any LightningModule of :mod:`modiff.lit.modules.teacher` on any image data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of training only."""
        parser.add_argument("--ema_decay", type=float | None, default=0.999, help="Of the averaged weights.")
        parser.add_argument("--ema_every", type=int, default=1, help="Optimizer steps between averagings.")
        parser.add_argument("--sample_images", type=int, default=40, help="Images drawn at each validation; 0: none.")
        parser.add_argument("--features", type=str | None, default=None, help="Feature network for a distance.")
        parser.add_argument("--reference", type=str | None, default=None, help="Of `modiff statistics`.")
        parser.add_argument("--distance_images", type=int, default=1000, help="Images drawn for the distance.")
        parser.add_argument("--checkpoint_every", type=int, default=250, help="Optimizer steps between checkpoints.")


def make_cli(args: Sequence[str]) -> TrainCLI:
    """Parse and build."""
    return TrainCLI(
        "train", args, model_class=LightningModule, datamodule_class=ImageDataModule, subclass_mode_model=True
    )


def train(args: Sequence[str]) -> int:
    """Train, resuming from the last checkpoint of the same run; then export.

    Raises:
        ConfigError: A field is wrong, or the data cannot be used; nothing is written then.
        CheckpointError: ``--ckpt`` does not exist.
    """
    cli = make_cli(args)
    config = cli.config
    if config.ckpt is not None and not Path(config.ckpt).is_file():
        raise CheckpointError(f"--ckpt {config.ckpt} does not exist. Give a file of Lightning, such as last.ckpt.")
    data = {k: v for k, v in config.data.as_dict().items() if k != "path"}
    run = cli.output_directory({"model": config.model.as_dict(), "data": data, "seed": config.seed})
    distance = distance_callback(config)  # refuses wrong files before anything is written
    rank_zero(cli.datamodule.setup, "fit")  # and this wrong data
    rank_zero(run.claim, cli.recipe)
    rank_zero(lambda: write_text(run.path / "config.yaml", cli.dump()))
    folder = run.path / "checkpoints"
    callbacks: list[Any] = [
        LearningRateMonitor("step"),
        ModelCheckpoint(dirpath=folder, every_n_train_steps=config.checkpoint_every, save_last=True, save_top_k=0),
    ]
    if config.sample_images:  # before the averaging, which swaps the weights back at the end of a validation
        callbacks.append(TrainingSamples(run.path / "samples", config.sample_images))
    callbacks += distance
    if config.ema_decay is not None:
        decay = config.ema_decay**config.ema_every  # the same memory in optimizer steps
        callbacks.append(EMAWeightAveraging(decay=decay, update_every_n_steps=config.ema_every))
    trainer = cli.make_trainer(callbacks, logger=CSVLogger(run.path, name="logs"), default_root_dir=run.path)
    last = folder / "last.ckpt"
    ckpt = config.ckpt or (str(last) if last.exists() else None)
    fit = partial(trainer.fit, cli.model, datamodule=cli.datamodule, ckpt_path=ckpt, weights_only=False)
    interruptible(run, trainer, fit)
    if trainer.is_global_zero:
        cli.model.export(run.path / "export")
        run.mark("complete")
        print(f"Trained; exported to {run.path / 'export'}.")
    return 0


def distance_callback(config: Namespace) -> list[TrainingDistance]:
    """The callback that logs the Fréchet distance, where it was asked for.

    Raises:
        ConfigError: Only one of the feature network and its reference statistics is given, or a number is below 1.
    """
    if config.ema_every < 1:
        raise ConfigError(f"ema_every is {config.ema_every}; allowed are whole numbers, 1 or more.")
    if (config.features is None) != (config.reference is None):
        raise ConfigError(
            "features and reference come together. Make the reference once: "
            "modiff statistics --features NETWORK --data.path FOLDER --output reference.safetensors"
        )
    if config.features is None:
        return []
    return [TrainingDistance(config.features, config.reference, config.distance_images)]
