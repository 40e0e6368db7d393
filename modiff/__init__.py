"""modiff: training-free quantization of diffusion models."""

from modiff.compiling.modes import compile
from modiff.config import Modulation, QuantConfig, QuantSpec, Rule
from modiff.student.checkpoint import load, save
from modiff.student.cost import cost
from modiff.student.pipeline import quantize_pipeline, restore_pipeline
from modiff.student.swap import describe, quantize, restore
from modiff.trajectory.session import trajectory

__all__ = [
    "Modulation",
    "QuantConfig",
    "QuantSpec",
    "Rule",
    "compile",
    "cost",
    "describe",
    "load",
    "quantize",
    "quantize_pipeline",
    "restore",
    "restore_pipeline",
    "save",
    "trajectory",
]
