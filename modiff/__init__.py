"""modiff: training-free quantization of diffusion models."""

from typing import Any

from modiff.compiling.modes import compile
from modiff.config import Modulation, QuantConfig, QuantSpec, Rule, Special
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
    "Special",
    "compile",
    "cost",
    "describe",
    "load",
    "quantize",
    "quantize_pipeline",
    "restore",
    "restore_pipeline",
    "save",
    "search",
    "trajectory",
]


def search(pipe: Any, quality: str = "psnr_db >= 30", prompts: Any = None, **options: Any) -> dict[str, Any]:
    """Find the cheapest setting of a diffusers pipeline that keeps a quality.

    Options and result: :func:`modiff.lit.search.pipeline.search_pipeline`, which is imported only here.
    """
    from modiff.lit.search.pipeline import search_pipeline

    return search_pipeline(pipe, quality, prompts, **options)
