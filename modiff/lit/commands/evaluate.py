"""``modiff evaluate`` and ``modiff sample``: from a recipe to images, metrics and a report."""

from __future__ import annotations

import shutil
import sys
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
from modiff.lit.callbacks.status import Status
from modiff.lit.callbacks.trajectory_errors import TrajectoryErrors
from modiff.lit.cli.student import StudentCLI
from modiff.lit.modules.student import LitStudent
from modiff.lit.report.result import Result
from modiff.lit.runs.batch_store import BatchStore
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.results import Writer, print_result, read_result
from modiff.lit.runs.running import interruptible, rank_zero, running
from modiff.lit.runs.shards import ShardStore, ShardWriter, disk_need, say_disk_need
from modiff.lit.runs.wandb import Guarded, finish_wandb, make_wandb_logger
from modiff.lit.runs.wandb_content import log_pictures
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
    store = given_images(cli, module) or BatchStore(run.path / "partial")
    rank_zero(check_disk, cli, module, run.path, 2)
    with running(run):
        claim(cli, run)
        module.keep_batches(store, BatchStore(teacher_images) if teacher_images else None)
        return _evaluate(cli, run, module, fidelity, group)


def _evaluate(cli: StudentCLI, run: RunDirectory, module: LitStudent, fidelity: Fidelity, group: str | None) -> Result:
    config = cli.config
    logger = make_wandb_logger(
        config.wandb, run.path, cli.recipe, cli.identity(), group, "evaluate", tags_of(module.spec.title, cli)
    )
    guarded = Guarded(logger, run.path)
    writer = Writer(cli, run, logger, guarded)
    callbacks = [
        Calibration(),
        ActivationCache(),
        Provenance(cli.recipe, cli.identity(), config.seed),
        fidelity,
        TrajectoryErrors(0 if config.from_images else config.error_images),
        Cost(0 if config.from_images else config.timing_rounds),
        Samples(run.path, config.sample_count, config.save_images, shard_writer(cli, run.path)),
        Status(run, guarded),
    ]
    trainer = cli.make_trainer(
        callbacks,
        logger=[CSVLogger(run.path, name="", version="logs"), *([logger] if logger else [])],
        default_root_dir=run.path,
    )
    start = time.perf_counter()
    try:
        interruptible(trainer, lambda: trainer.test(module, datamodule=cli.datamodule, verbose=False))
        if trainer.is_global_zero:
            writer.write(trainer, module, time.perf_counter() - start)
    finally:
        finish_wandb(logger, int(sys.exc_info()[0] is not None))
    trainer.strategy.barrier("written")
    return read_result(run.path)


def given_images(cli: StudentCLI, module: LitStudent) -> ShardStore | None:
    """The shards of ``--from_images``; a student whose images are there needs no calibration."""
    if cli.config.from_images is None:
        return None
    store = ShardStore(Path(cli.config.from_images), cli.config.data.batch_size)
    store.check(cli.num_images, module.image_shape)
    assert module.student is not None
    module.use_student(module.student, calibrated=True)
    return store


def shard_writer(cli: StudentCLI, folder: Path) -> ShardWriter | None:
    """Where ``--shards`` asks for one."""
    config = cli.config
    if config.shards is None:
        return None
    return ShardWriter(folder / "shards", config.shards, config.shard_images, config.data.batch_size, cli.num_images)


def check_disk(cli: StudentCLI, module: LitStudent, folder: Path, kinds: int) -> None:
    """Say beforehand what the images take."""
    config = cli.config
    if config.get("from_images") is None:
        shards, pictures = config.shards is not None, config.save_images
        say_disk_need(folder, disk_need(cli.num_images, module.image_shape, kinds, shards, pictures))


def tags_of(teacher: str, cli: StudentCLI) -> list[str]:
    """What a W&B run is filtered by: the teacher, and the folder and name of the recipe."""
    return sorted({part[:64] for part in (teacher, *cli.recipe.split("/")) if part})


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
    rank_zero(check_disk, cli, module, run.path, 1)
    with running(run):
        claim(cli, run)
        module.keep_batches(BatchStore(run.path / "partial"))
        _sample(cli, run, module)
    return 0


def _sample(cli: StudentCLI, run: RunDirectory, module: LitStudent) -> None:
    config = cli.config
    callbacks = [
        Calibration(),
        ActivationCache(),
        Provenance(cli.recipe, cli.identity(), config.seed),
        Samples(run.path, config.sample_count, config.shards is None, shard_writer(cli, run.path)),
    ]
    tags = tags_of(module.spec.title, cli)
    logger = make_wandb_logger(config.wandb, run.path, cli.recipe, cli.identity(), None, "sample", tags)
    guarded = Guarded(logger, run.path)
    callbacks.append(Status(run, guarded))
    trainer = cli.make_trainer(callbacks, logger=logger or False, default_root_dir=run.path)
    try:
        interruptible(trainer, lambda: trainer.predict(module, datamodule=cli.datamodule, return_predictions=False))
        guarded(lambda found: log_pictures(found, run.path))
    finally:
        finish_wandb(logger, int(sys.exc_info()[0] is not None))
    if trainer.is_global_zero:
        counted, made = module.result.evaluations, module.result.provenance
        facts = {"num_images": cli.num_images, "seed": config.seed, "provenance": made, "evaluations": counted}
        facts = {key: value for key, value in facts.items() if value is not None}
        write_json(run.path / "sample.json", facts)
        run.mark("complete")
        shutil.rmtree(run.path / "partial", ignore_errors=True)
        print(f"{cli.num_images} images in {run.path / 'images'}; a grid in {run.path / 'samples.png'}.")
