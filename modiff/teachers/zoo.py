"""Teachers by name: what the zoo has, and one function to load any of them."""

from __future__ import annotations

from modiff.teachers.catalog import ZOO, Entry, TeacherSpec
from modiff.teachers.teacher import Teacher

__all__ = ["ZOO", "Entry", "Teacher", "TeacherSpec", "load_teacher"]


def load_teacher(spec: TeacherSpec) -> Teacher:
    """Load a teacher from this machine; nothing is downloaded. See :mod:`modiff.teachers.loading`.

    Raises:
        CheckpointError: It is not here, a file is missing or damaged, or not of the architecture its config names.
        ConfigError: Its class is unknown, an extra is missing, or the image size does not fit.
    """
    from modiff.teachers.loading import load, load_random, load_tiny  # diffusers takes seconds to import

    return load_tiny(spec) if spec.tiny else load_random(spec) if spec.random else load(spec)
