"""Finished stages of a calibration on disk, from which an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Size, Tensor

from modiff.config import QuantSpec
from modiff.errors import CalibrationError, CheckpointError
from modiff.quantizers.packing import PackedWeight
from modiff.storage import read_manifest, read_tensors, write

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
        """The weights of a stage, on the CPU; None where it is not finished.

        Raises:
            CalibrationError: It is damaged, or of another calibration.
        """
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
            if set(manifest["shapes"]) != set(specs):
                raise CalibrationError(f"{path} holds a stage of other operators. Give a new folder.")
            return {name: _unpack(name, tensors, manifest["shapes"][name], spec) for name, spec in specs.items()}
        except CheckpointError as error:
            raise CalibrationError(f"The finished stage {path} cannot be used: {error} Or delete it.") from error

    def write(self, index: int, weights: Mapping[str, PackedWeight]) -> None:
        """Keep the weights of a stage.

        Raises:
            CalibrationError: The disk is full, or the folder cannot be written.
        """
        tensors = {}
        for name, packed in weights.items():
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = packed.codes.cpu(), packed.scale.cpu()
            if packed.zero_point is not None:
                tensors[f"{name}.zero_point"] = packed.zero_point.cpu()
        shapes = {name: list(packed.shape) for name, packed in weights.items()}
        try:
            write(self._path(index), {"calibration": self.key, "shapes": shapes}, tensors)
        except (CheckpointError, SafetensorError) as error:
            raise CalibrationError(f"A finished stage of the calibration cannot be kept: {error}") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"stage-{index:04d}"


def _unpack(name: str, tensors: Mapping[str, Tensor], shape: list[int], spec: QuantSpec) -> PackedWeight:
    codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
    return PackedWeight(codes, scale, tensors.get(f"{name}.zero_point"), Size(shape), spec)
