"""modiff: training-free quantization of diffusion models."""

from modiff.checkpoint import load, save
from modiff.compiling import compile
from modiff.config import Modulation, QuantConfig, QuantSpec, Rule
from modiff.conversion import describe, quantize, restore
from modiff.cost import cost
from modiff.layers.state import trajectory
from modiff.pipeline import quantize_pipeline, restore_pipeline

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
