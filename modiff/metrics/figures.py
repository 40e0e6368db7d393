"""All measures: importing this module registers those of every ``*_figures`` module of this package."""

from __future__ import annotations

import importlib
import pkgutil

import modiff.metrics
from modiff.metrics.registry import MEASURES, Figure, Findings, ImagePairs, Measure, Setting, all_figures, measure

__all__ = ["MEASURES", "Figure", "Findings", "ImagePairs", "Measure", "Setting", "all_figures", "measure"]

for _module in pkgutil.iter_modules(modiff.metrics.__path__):
    if _module.name.endswith("_figures"):
        importlib.import_module(f"modiff.metrics.{_module.name}")
