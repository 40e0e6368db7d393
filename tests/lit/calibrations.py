"""What the tests of calibration by recipe share."""

from __future__ import annotations

from pathlib import Path

from modiff.lit.modules.calibration_config import CalibrationConfig
from modiff.lit.modules.student import LitStudent
from modiff.teachers.zoo import TeacherSpec

RANGES = "{bits: 4, granularity: tensor, range: calibrated}"


def module_of(teacher: Path, preset="w3a4-modiff-paper", **options) -> LitStudent:
    calibration = CalibrationConfig(**{"num_images": 6, "images_per_batch": 4, "positions": 200} | options)
    module = LitStudent(TeacherSpec(path=str(teacher)), preset=preset, steps=3, calibration=calibration)
    module.configure_model()
    return module


def tensors_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
