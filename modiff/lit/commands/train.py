"""``modiff train``: a small teacher, or the classifier that measures its images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.callbacks.agreement import keep_order_of_sums
from modiff.lit.callbacks.status import Status
from modiff.lit.callbacks.training_samples import TrainingDistance, TrainingSamples
from modiff.lit.cli.base import ModiffCLI
from modiff.lit.data.images import ImageDataModule
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.launchers import wanted_devices
from modiff.lit.runs.running import interruptible, rank_zero, running
from modiff.lit.runs.wandb import Guarded, finish_wandb, make_wandb_logger
from modiff.lit.runs.wandb_content import log_samples
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
    with running(run):
        rank_zero(run.claim, cli.recipe)
        _train(cli, run, distance)
    return 0


def _train(cli: TrainCLI, run: RunDirectory, distance: list[TrainingDistance]) -> None:
    config = cli.config
    rank_zero(lambda: write_text(run.path / "config.yaml", cli.dump()))
    folder = run.path / "checkpoints"
    callbacks: list[Any] = [
        LearningRateMonitor("step"),
        ModelCheckpoint(
            dirpath=folder,
            every_n_train_steps=config.checkpoint_every,
            save_last=True,
            save_top_k=0,
            enable_version_counter=False,  # one last.ckpt, whoever wrote it first
        ),
    ]
    if config.sample_images:  # before the averaging, which swaps the weights back at the end of a validation
        callbacks.append(TrainingSamples(run.path / "samples", config.sample_images))
    callbacks += distance
    if config.ema_decay is not None:
        decay = config.ema_decay**config.ema_every  # the same memory in optimizer steps
        callbacks.append(EMAWeightAveraging(decay=decay, update_every_n_steps=config.ema_every))
    count_in_steps(cli)
    callbacks.append(Status(run))
    values = {"model": config.model.as_dict(), "seed": config.seed}
    logger = make_wandb_logger(config.wandb, run.path, cli.recipe, values, None, "train", cli.recipe.split("/"))
    loggers = [CSVLogger(run.path, name="logs"), *([logger] if logger else [])]
    trainer = keep_order_of_sums(cli.make_trainer(callbacks, logger=loggers, default_root_dir=run.path))
    last = folder / "last.ckpt"
    ckpt = config.ckpt or (str(last) if last.exists() else None)
    fit = partial(trainer.fit, cli.model, datamodule=cli.datamodule, ckpt_path=ckpt, weights_only=False)
    try:
        interruptible(trainer, fit)
        use_finished_weights(cli.model, ckpt, trainer.max_steps)
        Guarded(logger, run.path)(lambda found: log_samples(found, run.path / "samples"))
    finally:
        finish_wandb(logger, int(sys.exc_info()[0] is not None))
    if trainer.is_global_zero:
        cli.model.export(run.path / "export")
        run.mark("complete")
        print(f"Trained; exported to {run.path / 'export'}.")


def use_finished_weights(module: LightningModule, ckpt: str | None, max_steps: int) -> None:
    """Take the averaged weights of a checkpoint that had nothing left to train: Lightning then ends without them."""
    if ckpt is None:
        return
    saved = torch.load(ckpt, map_location="cpu", weights_only=False)
    if 0 < max_steps <= saved["global_step"]:
        module.load_state_dict(saved["state_dict"])


def count_in_steps(cli: TrainCLI) -> None:
    """Say how long to train in optimizer steps, where the recipe says it in epochs.

    Lightning goes on from the middle of an epoch to the very step only where it counts in steps.
    """
    trainer, data = cli.config_init.trainer, cli.datamodule
    if trainer.max_steps != -1 or trainer.max_epochs == -1 or trainer.fast_dev_run:
        return
    world = wanted_devices(trainer.devices, trainer.accelerator) * int(trainer.num_nodes)
    if data.train_set is None:
        data.setup("fit")
    batches, limit = len(data.train_set) // world // data.batch_size, trainer.limit_train_batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    epochs = 1000 if trainer.max_epochs is None else trainer.max_epochs  # Lightning's default
    trainer.max_steps = epochs * -(-batches // trainer.accumulate_grad_batches)
    trainer.max_epochs = -1


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
