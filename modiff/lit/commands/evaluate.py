"""``modiff evaluate`` and ``modiff sample``: from a recipe to images, metrics and a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from modiff.errors import ConfigError
from modiff.lit.callbacks.activation_cache import ActivationCache
from modiff.lit.callbacks.calibration import Calibration
from modiff.lit.callbacks.cost import Cost
from modiff.lit.callbacks.fidelity import Fidelity
from modiff.lit.callbacks.provenance import Provenance
from modiff.lit.callbacks.samples import Samples
from modiff.lit.callbacks.trajectory_errors import TrajectoryErrors
from modiff.lit.cli.student import StudentCLI
from modiff.lit.report.result import Result
from modiff.lit.runs.batch_store import BatchStore
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.results import Writer, print_result, read_result
from modiff.lit.runs.running import interruptible, rank_zero
from modiff.lit.runs.wandb import finish_wandb, make_wandb_logger
from modiff.storage.atomic import write_json, write_text


def evaluate(args: Sequence[str]) -> int:
    """Run ``modiff evaluate``: evaluate a recipe, then print its figures and where the report is."""
    cli = StudentCLI("evaluate", args)
    result = evaluate_recipe(cli)
    rank_zero(print_result, cli.recipe, result, cli.output_path)
    return 0


def evaluate_recipe(cli: StudentCLI, teacher_images: Path | None = None, group: str | None = None) -> Result:
    """Evaluate one recipe into its directory.

    Args:
        cli: The parsed recipe.
        teacher_images: Folder in which recipes of one comparison share the teacher's images.
        group: Of the W&B run.

    Raises:
        ConfigError: Nothing is quantized, or the directory holds another run.
    """
    if cli.model.config is None and cli.config.ckpt is None:
        raise ConfigError(
            "Nothing is quantized: give --model.preset, for example w8a4-modiff, --model.config or --ckpt. "
            "`modiff sample` draws with the teacher alone."
        )
    module = cli.prepare_model()  # before the directory is claimed: a wrong recipe leaves no trace
    run = cli.output_directory(cli.identity())
    if run.complete and run.resumed:
        rank_zero(print, f"{run.path} holds this very run, complete; nothing to do (--overwrite true repeats it).")
        return read_result(run.path)
    fidelity = Fidelity.of(module)
    claim(cli, run)
    module.keep_batches(BatchStore(run.path / "partial"), BatchStore(teacher_images) if teacher_images else None)
    logger = make_wandb_logger(cli.config.wandb, run.path, cli.recipe, cli.identity(), group)
    writer = Writer(cli, run, logger)
    config = cli.config
    callbacks = [
        Calibration(),
        ActivationCache(),
        Provenance(cli.recipe, cli.identity(), config.seed),
        fidelity,
        TrajectoryErrors(config.error_images),
        Cost(config.timing_rounds),
        Samples(run.path, config.sample_count, config.save_images),
    ]
    trainer = cli.make_trainer(
        callbacks,
        logger=[CSVLogger(run.path, name="", version="logs"), *([logger] if logger else [])],
        default_root_dir=run.path,
    )
    start = time.perf_counter()
    try:
        interruptible(run, trainer, lambda: trainer.test(module, datamodule=cli.datamodule, verbose=False))
        if trainer.is_global_zero:
            writer.write(trainer, module, time.perf_counter() - start)
    finally:
        finish_wandb(logger)
    trainer.strategy.barrier("written")
    return read_result(run.path)


def claim(cli: StudentCLI, run: RunDirectory) -> None:
    """Take the directory, and write the recipe into it."""
    rank_zero(run.claim, cli.recipe)
    rank_zero(lambda: write_text(run.path / "config.yaml", cli.dump()))


def sample(args: Sequence[str]) -> int:
    """Run ``modiff sample``: draw images with the student, or with the teacher if nothing is quantized."""
    cli = StudentCLI("sample", args)
    module = cli.prepare_model()
    run = cli.output_directory(cli.identity())
    if run.complete and run.resumed:
        rank_zero(print, f"{run.path} holds this very run, complete; nothing to do (--overwrite true repeats it).")
        return 0
    claim(cli, run)
    module.keep_batches(BatchStore(run.path / "partial"))
    config = cli.config
    callbacks = [
        Calibration(),
        ActivationCache(),
        Provenance(cli.recipe, cli.identity(), config.seed),
        Samples(run.path, config.sample_count, save_images=True),
    ]
    trainer = cli.make_trainer(callbacks, logger=False, default_root_dir=run.path)
    interruptible(run, trainer, lambda: trainer.predict(module, datamodule=cli.datamodule, return_predictions=False))
    if trainer.is_global_zero:
        counted, made = module.result.evaluations, module.result.provenance
        facts = {"num_images": cli.num_images, "seed": config.seed, "provenance": made, "evaluations": counted}
        facts = {key: value for key, value in facts.items() if value is not None}
        write_json(run.path / "sample.json", facts)
        run.mark("complete")
        shutil.rmtree(run.path / "partial", ignore_errors=True)
        print(f"{cli.num_images} images in {run.path / 'images'}; a grid in {run.path / 'samples.png'}.")
    return 0
