"""The options and the parsing of the commands that draw images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from modiff.config import QuantConfig
from modiff.config.checks import shown
from modiff.errors import CalibrationError, CheckpointError, ConfigError
from modiff.lit.cli.base import ModiffCLI
from modiff.lit.cli.quantization import resolve_quantization
from modiff.lit.data.conditions import SampleDataModule
from modiff.lit.modules.student import LitStudent
from modiff.storage.folder import read_manifest
from modiff.storage.hashing import short_hash
from modiff.teachers.zoo import ZOO, Teacher

MOST = 1_000_000


class StudentCLI(ModiffCLI):
    """The commands that draw images: a LitStudent and a SampleDataModule."""

    def __init__(self, command: str, args: Sequence[str]) -> None:
        super().__init__(command, args, model_class=LitStudent, datamodule_class=SampleDataModule)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the commands that draw images."""
        parser.add_argument("--save_images", type=bool, default=False, help="Write every image to a PNG file.")
        parser.add_argument(
            "--sample_count", type=int, default=24, help="Number of samples in samples.png and in the report."
        )
        parser.add_argument(
            "--error_images", type=int, default=4, help="Number of samples for the error curves; 0 skips them."
        )
        parser.add_argument("--timing_rounds", type=int, default=3, help="Rounds of timing; 0 skips it.")
        parser.add_argument("--shards", type=Literal["tar", "npz"] | None, default=None, help="Images as shards, too.")
        parser.add_argument("--shard_images", type=int, default=1000, help="Images in a shard.")
        if self.command == "evaluate":
            text = "Folder of shards: their metrics, without drawing."
            parser.add_argument("--from_images", type=str | None, default=None, help=text)
        if self.command == "quantize":
            parser.add_argument(
                "--remainder_dtype",
                type=Literal["float32", "float16", "bfloat16"] | None,
                default=None,
                help="Dtype of unquantized tensors in the file; None keeps it. A narrower one loses bits.",
            )
        parser.link_arguments("num_images", "data.num_images")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Resolve the quantization first: ``--model.config.FIELD`` overrides a field of the preset too."""
        if any(str(arg).endswith(".help") for arg in args):
            super().parse_arguments(parser, args)  # prints it and exits
        args = [str(arg).replace("--from-images", "--from_images", 1) for arg in args]
        rest, quantization, calibration = resolve_quantization(args)
        # The last option wins over the recipes, which jsonargparse reads as well.
        rest += ["--model.preset=null", f"--model.config={json.dumps(quantization)}"]
        rest += [f"--model.calibration={json.dumps(calibration)}"]
        super().parse_arguments(parser, rest)
        for name, low in (("sample_count", 1), ("error_images", 0), ("timing_rounds", 0)):
            if not low <= self.config[name] <= MOST:
                raise ConfigError(f"{name} is {shown(self.config[name])}; allowed are whole numbers, {low} to {MOST}.")
        if self.config.ckpt is not None:
            self._check_checkpoint(Path(self.config.ckpt), quantization, calibration)
        self._fill_in_teacher_defaults()

    def _check_checkpoint(self, path: Path, quantization: Any, calibration: Any) -> None:
        """A recipe may come with the checkpoint that was made by it, and with no other."""
        if quantization is None and calibration is None:
            return
        manifest = read_manifest(path)
        if quantization is not None and not _asked_for(manifest["quant_config"], json.loads(json.dumps(quantization))):
            raise ConfigError(
                f"--ckpt {path} holds a quantization of its own, but the recipe gives another one. Add "
                "--model.preset null (and --model.config null), or remove --ckpt."
            )
        made = (manifest.get("origin") or {}).get("calibration")
        if calibration is None or made == (wanted := json.loads(json.dumps(calibration))):
            return
        how = "without calibration"
        if made is not None:
            field = next((key for key in wanted if made.get(key) != wanted[key]), "set of fields")
            how = f"by another calibration than the recipe's ({field} is {made.get(field)!r})"
        raise CalibrationError(
            f"--ckpt {path} was made {how}. Make it with this recipe by modiff quantize, add --model.calibration null, "
            "or remove --ckpt."
        )

    def _fill_in_teacher_defaults(self) -> None:
        """Write what the zoo decides into the recipe, so that the saved one says it."""
        model = self.config.model
        entry = ZOO.get(model.teacher.name)
        for key in ("scheduler", "steps", "guidance"):
            if entry is not None and model[key] is None:
                model[key] = getattr(entry, key)

    def prepare_model(self, loaded: Teacher | None = None) -> LitStudent:
        """Load the teacher and make the student, from ``--ckpt`` where that is given.

        Args:
            loaded: A teacher that another recipe has loaded; None: load it.
        """
        return self.model.prepare(self.config.seed, self.datamodule.conditions, self.config.ckpt, loaded)

    def identity(self) -> dict[str, Any]:
        """What makes a run the same run: everything that the images and figures depend on."""
        config = self.config
        return {
            "model": plain_values(config.model),
            "num_images": self.num_images,
            "batch_size": config.data.batch_size,
            "seed": config.seed,
            "precision": config.trainer.precision,
            "ckpt": None if config.ckpt is None else checkpoint_digest(Path(config.ckpt)),
            **self._shards_identity(),
            **self.datamodule.identity(),
        }

    def _shards_identity(self) -> dict[str, Any]:
        """The images that were given, where they are not drawn."""
        given = self.config.get("from_images")
        return {} if given is None else {"from_images": short_hash((Path(given) / "shards.json").read_text())}

    @property
    def num_images(self) -> int:
        """The number of images to keep."""
        return int(self.datamodule.num_images)


def plain_values(value: Any) -> Any:
    """A parsed config as plain containers; ``Namespace.as_dict`` leaves those inside lists (rules) as they are."""
    if isinstance(value, Namespace):
        return {key: plain_values(item) for key, item in value.as_dict().items()}
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def checkpoint_digest(folder: Path) -> str:
    """Content hash of a packed student, which names the hash of its weights.

    Raises:
        CheckpointError: There is none.
    """
    manifest = folder / "config.json"
    if not manifest.is_file():
        raise CheckpointError(f"--ckpt {folder} holds no config.json. Give a folder that `modiff quantize` wrote.")
    return short_hash(manifest.read_text())


def _asked_for(saved: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a saved quantization is the one a recipe asks for; operators that it leaves to be found may be any."""
    saved = json.loads(json.dumps(dataclasses.asdict(QuantConfig.from_dict(saved))))  # fields of today's version
    wanted = dict(wanted)
    for kind in ("vectors", "ends"):
        if wanted.get(kind) and saved.get(kind) and wanted[kind]["names"] is None:
            wanted[kind] = {**wanted[kind], "names": saved[kind]["names"]}
    return bool(saved == wanted)
