"""Finished stages of a calibration on disk, from which an interrupted one is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from modiff.config.quant import QuantSpec
from modiff.errors import CalibrationError, CheckpointError
from modiff.quantizers.calibrated import CalibratedRange, ranges_from_tensors, ranges_to_tensors
from modiff.quantizers.packing import PackedWeight
from modiff.storage.folder import read_manifest, read_tensors, write

Progress = Callable[[int, int, str], Any]
"""Called with stages done, stages in all, and what the last one was."""


class StageFolder:
    """A folder with one directory for each finished stage, each written whole or not at all and verified when read.

    Args:
        folder: Made at the first write.
        key: What the calibration depends on; a stage of another key is refused.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key: dict[str, Any] = json.loads(json.dumps(key))  # as it comes back: tuples are lists

    def read(self, index: int, specs: Mapping[str, QuantSpec]) -> dict[str, PackedWeight] | None:
        """Return the weights of a stage, on the CPU; None where it is not finished.

        Raises:
            CalibrationError: It is damaged, or of another calibration.
        """
        read = self._read(index, "shapes", specs)
        if read is None:
            return None
        shapes, tensors = read
        return {name: PackedWeight.from_tensors(tensors, name, shapes[name], spec) for name, spec in specs.items()}

    def read_ranges(self, index: int, names: Collection[str]) -> dict[str, CalibratedRange] | None:
        """Return the calibrated ranges of a stage, on the CPU; None where it is not finished.

        Raises:
            CalibrationError: It is damaged, or of another calibration.
        """
        read = self._read(index, "lengths", names)
        if read is None:
            return None
        lengths, tensors = read
        return ranges_from_tensors(tensors, lengths)

    def write_ranges(self, index: int, ranges: Mapping[str, CalibratedRange]) -> None:
        """Keep the calibrated ranges of a stage.

        Raises:
            CalibrationError: The disk is full, or the folder cannot be written.
        """
        tensors, lengths = ranges_to_tensors(ranges)
        self._write(index, {"lengths": lengths}, tensors)

    def write(self, index: int, weights: Mapping[str, PackedWeight]) -> None:
        """Keep the weights of a stage.

        Raises:
            CalibrationError: The disk is full, or the folder cannot be written.
        """
        tensors = {}
        for name, packed in weights.items():
            tensors.update(packed.tensors(name))
        shapes = {name: list(packed.shape) for name, packed in weights.items()}
        self._write(index, {"shapes": shapes}, tensors)

    def _read(self, index: int, field: str, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what the manifest says of each operator in ``field``, and the stage's tensors."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            manifest = read_manifest(path)
            saved = manifest.get("calibration", {})
            differing = [name for name in self.key if saved.get(name) != self.key[name]]
            if differing:
                raise CalibrationError(
                    f"{self.folder} holds a calibration of another {differing[0]}. Give a new folder, or call with "
                    "what it was begun with."
                )
            tensors = read_tensors(path, manifest)
        except CheckpointError as error:
            raise CalibrationError(f"The finished stage {path} cannot be used: {error} Or delete it.") from error
        described = manifest.get(field, {})
        if set(described) != set(names):
            raise CalibrationError(f"{path} holds a stage of other operators. Give a new folder.")
        return described, tensors

    def _write(self, index: int, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            write(self._path(index), {"calibration": self.key, **manifest}, tensors)
        except (CheckpointError, SafetensorError) as error:
            raise CalibrationError(f"A finished stage of the calibration cannot be kept: {error}") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"stage-{index:04d}"
