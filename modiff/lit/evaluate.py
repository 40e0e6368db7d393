"""``modiff evaluate`` and ``modiff sample``: from a recipe to images, metrics and a report."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.config import QuantConfig
from modiff.conversion import describe
from modiff.errors import ConfigError
from modiff.lit import plots
from modiff.lit.base import ModiffCLI
from modiff.lit.callbacks.activation_cache import ActivationCache
from modiff.lit.callbacks.costs import Cost
from modiff.lit.callbacks.fidelity import Fidelity
from modiff.lit.callbacks.provenance import Provenance
from modiff.lit.callbacks.samples import Samples
from modiff.lit.callbacks.trajectory_errors import TrajectoryErrors
from modiff.lit.conditions import SampleDataModule
from modiff.lit.report import write_report
from modiff.lit.rundir import RunDirectory, atomic_write, write_json
from modiff.lit.store import BatchStore
from modiff.lit.student import LitStudent
from modiff.lit.wandb_logger import finish_wandb, make_wandb_logger
from modiff.teachers.zoo import ZOO


class StudentCLI(ModiffCLI):
    """The commands that draw images: a LitStudent and a SampleDataModule."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        super().__init__(command, args, model_class=LitStudent, datamodule_class=SampleDataModule)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of drawing only."""
        parser.add_argument("--save_images", type=bool, default=False, help="Write every image as a PNG file.")
        parser.add_argument("--sample_count", type=int, default=24, help="Samples in samples.png.")
        parser.add_argument("--error_images", type=int, default=4, help="Samples for the error curves; 0: none.")
        parser.add_argument("--timing_rounds", type=int, default=3, help="Rounds of the timing; 0: none.")
        parser.link_arguments("num_images", "data.num_images")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Expand the preset first, so that ``--model.config.FIELD`` overrides one of its fields."""
        preset = find_preset(args)
        if preset is not None:
            parser.set_defaults({"model.config": dataclasses.asdict(QuantConfig.preset(preset))})
        super().parse_arguments(parser, args)
        self.config.model.preset = None
        self._fill_in_teacher_defaults()

    def _fill_in_teacher_defaults(self) -> None:
        """Write what the zoo decides into the recipe, so that the saved one says it."""
        model = self.config.model
        entry = ZOO.get(model.teacher.name)
        for key in ("scheduler", "steps", "guidance"):
            if entry is not None and model[key] is None:
                model[key] = getattr(entry, key)

    def identity(self) -> dict[str, Any]:
        """What makes a run the same run: everything that the images and figures depend on."""
        config = self.config
        return {
            "model": plain_values(config.model),
            "num_images": self.num_images,
            "batch_size": config.data.batch_size,
            "seed": config.seed,
            "precision": config.trainer.precision,
            **self.datamodule.identity(),
        }

    @property
    def num_images(self) -> int:
        """Images to keep."""
        return int(self.datamodule.num_images)


def plain_values(value: Any) -> Any:
    """A parsed config as plain containers; ``Namespace.as_dict`` leaves those inside lists (rules) as they are."""
    if isinstance(value, Namespace):
        return {key: plain_values(item) for key, item in value.as_dict().items()}
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def find_preset(args: Sequence[str]) -> str | None:
    """The preset that recipes and command line ask for, the last one winning.

    Raises:
        ConfigError: A recipe or the command line gives a preset and a whole config.
    """
    preset, config_in = None, None
    tokens = list(args)
    for i, token in enumerate(tokens):
        key, equals, value = token.partition("=")
        value = value if equals else (tokens[i + 1] if i + 1 < len(tokens) else "")
        if key in ("--config", "-c"):
            model = _read_yaml(value).get("model") or {}
            if isinstance(model, dict):
                preset = model.get("preset", preset)
                config_in = value if model.get("config") is not None else config_in
        elif key == "--model.preset":
            preset = None if value in ("null", "None") else value
        elif key == "--model.config" and value not in ("null", "None"):
            config_in = "the command line"
    if preset is not None and config_in is not None:
        raise ConfigError(f"preset {preset!r} and a config (in {config_in}) are both given. Remove one of them.")
    return preset


def _read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ConfigError(f"--config {path} does not exist. Give a recipe, such as recipes/mnist/w8a4_modiff.yaml.")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}".replace("\n", " ")) from error
    return content if isinstance(content, dict) else {}


def evaluate(args: Sequence[str]) -> int:
    """``modiff evaluate``."""
    cli = StudentCLI("evaluate", args)
    evaluate_recipe(cli)
    return 0


def evaluate_recipe(cli: StudentCLI, teacher_images: Path | None = None, group: str | None = None) -> dict[str, Any]:
    """Evaluate one recipe into its directory; returns the content of ``metrics.json``.

    Args:
        cli: The parsed recipe.
        teacher_images: Folder in which recipes of one comparison share the teacher's images.
        group: Of the W&B run.

    Raises:
        ConfigError: Nothing is quantized, or the directory holds another run.
    """
    if cli.model.config is None:
        raise ConfigError(
            "Nothing is quantized: give --model.preset, for example w8a4-modiff, or --model.config. "
            "`modiff sample` draws with the teacher alone."
        )
    run = cli.output_directory(cli.identity())
    if run.complete and run.resumed:
        rank_zero(print, f"{run.path} holds this very run, complete; nothing to do (--overwrite true repeats it).")
        return json.loads((run.path / "metrics.json").read_text())
    cli.model.configure_model()
    fidelity = Fidelity.of(cli.model)
    module = prepare(cli, run)
    module.teacher_store = BatchStore(teacher_images) if teacher_images else None
    logger = make_wandb_logger(cli.config.wandb, run.path, cli.recipe, cli.identity(), group)
    writer = Writer(cli, run, logger)
    config = cli.config
    callbacks = [
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
    return json.loads((run.path / "metrics.json").read_text())


def prepare(cli: StudentCLI, run: RunDirectory) -> LitStudent:
    """Build the student first, so that a wrong recipe leaves no trace; then claim the directory."""
    module: LitStudent = cli.model
    module.seed = cli.config.seed
    module.conditions = cli.datamodule.conditions
    module.configure_model()
    rank_zero(run.claim, cli.recipe)
    rank_zero(atomic_write, run.path / "config.yaml", lambda path: path.write_text(cli.dump()))
    module.store = BatchStore(run.path / "partial")
    return module


def interruptible(run: RunDirectory, trainer: Trainer, work: Callable[[], Any]) -> None:
    """Run; after Ctrl-C mark the partial output as such and raise KeyboardInterrupt (Lightning would exit)."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        work()
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        rank_zero(run.mark, "interrupted")
        raise KeyboardInterrupt from error


def rank_zero(function: Callable[..., Any], *args: Any) -> None:
    """Call on rank 0 only, before there is a process group."""
    if rank_zero_only.rank in (None, 0):
        function(*args)


class Writer:
    """Turns the results of a finished run into files.

    Args:
        cli: The parsed recipe.
        run: Its directory.
        logger: W&B, or None.
    """

    def __init__(self, cli: StudentCLI, run: RunDirectory, logger: Any) -> None:
        self.cli, self.run, self.logger = cli, run, logger

    def write(self, trainer: Trainer, module: LitStudent, seconds: float) -> None:
        """Write metrics.json, pictures and the report; then drop the batches kept for resuming."""
        results, folder = module.results, self.run.path
        metrics = self.metrics(results, seconds)
        errors, rows = results.get("errors"), results["cost_rows"]
        if errors:
            plots.trajectory_errors_plot(errors, folder / "trajectory_errors.png", self.cli.recipe)
            write_json(folder / "trajectory_errors.json", errors)
        plots.cost_plot(rows, folder / "cost.png")
        write_json(folder / "cost.json", rows)
        write_report(
            folder,
            recipe=self.cli.recipe,
            metrics=metrics,
            errors=errors,
            cost_rows=rows,
            config_yaml=self.cli.dump(),
            description=str(describe(module.student)),  # type: ignore[arg-type]
        )
        write_json(folder / "metrics.json", metrics)
        self.log(trainer, metrics, folder)
        self.run.mark("complete")
        shutil.rmtree(folder / "partial", ignore_errors=True)

    def metrics(self, results: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The content of metrics.json."""
        return {
            **results["fidelity"],
            "cost": results["cost"],
            "evaluations": results["evaluations"],
            "num_images": self.cli.num_images,
            "seconds": seconds,
            **results.get("timing", {"seconds_per_image_evaluation": None, "time_ratio": None}),
            "seed": self.cli.config.seed,
            "provenance": results["provenance"],
        }

    def log(self, trainer: Trainer, metrics: dict[str, Any], folder: Path) -> None:
        """Numbers to every logger, pictures to W&B."""
        numbers = {k: v for k, v in flatten(metrics).items() if isinstance(v, (int, float))}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=0)
            logger.save()
        if self.logger is not None:
            for name in ("samples", "trajectory_errors", "cost"):
                if (folder / f"{name}.png").is_file():
                    self.logger.log_image(name, [str(folder / f"{name}.png")])


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted names.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def sample(args: Sequence[str]) -> int:
    """``modiff sample``: images only; with no quantization, the teacher's."""
    cli = StudentCLI("sample", args)
    run = cli.output_directory(cli.identity())
    if run.complete and run.resumed:
        rank_zero(print, f"{run.path} holds this very run, complete; nothing to do (--overwrite true repeats it).")
        return 0
    module = prepare(cli, run)
    config = cli.config
    callbacks = [
        ActivationCache(),
        Provenance(cli.recipe, cli.identity(), config.seed),
        Samples(run.path, config.sample_count, save_images=True),
    ]
    trainer = cli.make_trainer(callbacks, logger=False, default_root_dir=run.path)
    interruptible(run, trainer, lambda: trainer.predict(module, datamodule=cli.datamodule, return_predictions=False))
    if trainer.is_global_zero:
        facts = {"num_images": cli.num_images, "seed": config.seed, **module.results}
        write_json(run.path / "sample.json", facts)
        run.mark("complete")
        shutil.rmtree(run.path / "partial", ignore_errors=True)
        print(f"{cli.num_images} images in {run.path / 'images'}; a grid in {run.path / 'samples.png'}.")
    return 0
