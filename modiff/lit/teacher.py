"""The class paths that recipes of modiff 0.1 name; their classes live in :mod:`modiff.lit.modules.teacher`."""

from modiff.lit.modules.teacher import LitClassifier, LitTeacher

__all__ = ["LitClassifier", "LitTeacher"]
