"""What the commands on LightningCLI share: options, errors, the output directory."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, Namespace
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from modiff.errors import ConfigError
from modiff.lit.callbacks.agreement import Agreement, own_signals
from modiff.lit.callbacks.progress import progress_bar
from modiff.lit.cli.documents import check_arguments
from modiff.lit.cli.errors import plain_error
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.launchers import settle_rank

FIXED_TRAINER = {"inference_mode": False, "use_distributed_sampler": False}


class ModiffCLI(LightningCLI):
    """LightningCLI with the options every modiff command has; it parses and builds, the command runs."""

    def __init__(self, command: str, args: Sequence[str], **kwargs: Any) -> None:
        self.command = command
        self.raw_args = list(args)
        check_arguments(args)
        self.callbacks: list[Any] = []
        quiet()
        kwargs.setdefault("parser_kwargs", {"exit_on_error": False, "prog": f"modiff {command}", "allow_abbrev": False})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.*")
            warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)
            super().__init__(
                run=False,
                args=self.raw_args,
                save_config_callback=None,
                trainer_defaults={**FIXED_TRAINER, "enable_model_summary": False},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                **kwargs,
            )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that every command shares."""
        parser.add_argument("--output", type=str | None, default=None, help="Directory; default runs/<recipe>.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace another run in --output.")
        parser.add_argument("--num_images", type=int | None, default=None, help="Number of images to draw.")
        parser.add_argument("--ckpt", type=str | None, default=None, help="Checkpoint to start from.")
        parser.add_argument("--seed", type=int, default=0, help="Seed; image i depends on the seed and on i only.")
        parser.add_argument(
            "--wandb",
            type=Literal["auto", "online", "offline", "disabled"],
            default="auto",
            help="Weights & Biases; auto: online with credentials, else offline.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; a wrong field is reported once, in one plain sentence."""
        try:
            super().parse_arguments(parser, args)
        except (ArgumentError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(plain_error(error, parser)) from error
        for key, value in FIXED_TRAINER.items():
            if self.config.trainer[key] != value:
                raise ConfigError(f"trainer.{key} must be {value}: modiff keeps state between evaluations. Remove it.")
        if not 0 <= self.config.seed < 2**32:
            raise ConfigError(f"seed is {self.config.seed}; allowed are whole numbers, 0 to {2**32 - 1}.")
        settle_rank(self.config.trainer)

    def instantiate_classes(self) -> None:
        """Build the classes; fields that only their class can check are refused here, as plainly."""
        self._refuse_devices()
        try:
            super().instantiate_classes()
        except (ArgumentError, ValueError, TypeError) as error:
            raise ConfigError(plain_error(error)) from error

    def _refuse_devices(self) -> None:
        """Let Lightning look for the devices, before anything is written."""
        given = self.config.trainer
        names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
        plain = {name: given[name] for name in names if isinstance(given[name], (str, int, list, type(None)))}
        nothing = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False
        )
        rank = rank_zero_only.rank
        try:
            Trainer(**plain, **nothing)
        except KeyError:
            return  # a variable of the launcher is missing; the Trainer itself says which, where it needs it
        except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"Lightning refuses the trainer's arguments: {plain_error(error)}") from error
        finally:
            rank_zero_only.rank = rank  # without the plugins a Trainer may take this process for the first

    def _set_seed(self) -> None:
        seed_everything(self.config.seed, workers=True, verbose=False)

    @property
    def recipe(self) -> str:
        """Name of the recipe: its path below ``recipes/`` without the ending, else its stem."""
        files = self.config.get("config") or []
        return recipe_name(str(files[0])) if files else self.command

    def output_directory(self, identity: dict[str, Any]) -> RunDirectory:
        """The run's directory, refused when it holds another run."""
        return RunDirectory(self.output_path, {"command": self.command, **identity}, self.config.overwrite)

    @property
    def output_path(self) -> Path:
        """``--output``, or the directory named after the recipe; a run of a W&B sweep has one of its own."""
        sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
        own = Path("sweeps") / sweep / run if sweep and run else Path(self.recipe)
        return Path(self.config.output or Path("runs") / own)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build nothing yet: :meth:`make_trainer` does, once the output directory is known."""
        return None  # type: ignore[return-value]

    def make_trainer(self, callbacks: list[Any], **kwargs: Any) -> Trainer:
        """The Trainer of the recipe with our callbacks first; kwargs fill what the recipe left unset.

        Raises:
            ConfigError: Lightning refuses its arguments.
        """
        config = dict(self.config_init.trainer)
        given = config.pop("callbacks") or []
        config["callbacks"] = callbacks + (given if isinstance(given, list) else [given])
        if config.get("enable_progress_bar") is not False:
            config["callbacks"].insert(0, progress_bar())
        for key, value in kwargs.items():
            if config.get(key) is None:
                config[key] = value
        config["callbacks"].append(Agreement(config["default_root_dir"]))
        try:
            return own_signals(Trainer(**config))
        except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
            raise ConfigError(f"Lightning refuses the trainer's arguments: {plain_error(error)}") from error

    def dump(self) -> str:
        """The full recipe as YAML, nulls kept."""
        config = Namespace(self.config)
        config.pop("config", None)
        return self.parser.dump(config, skip_unset=False, skip_validation=True)


def quiet() -> None:
    """Silence advertisements, device lists and warnings of Lightning that nobody here can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec")
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)


def recipe_name(path: str) -> str:
    """Name of a recipe file.

    >>> recipe_name("recipes/mnist/w8a4_ptq.yaml"), recipe_name("/tmp/mine.yaml")
    ('mnist/w8a4_ptq', 'mine')
    """
    file = Path(path)
    parts = file.with_suffix("").parts
    if "recipes" in parts[:-1]:
        below = len(parts) - 1 - parts[::-1].index("recipes")
        return "/".join(parts[below + 1 :])
    return file.stem
