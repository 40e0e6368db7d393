"""Every error that modiff raises on purpose.

A message says what was given, what is allowed and what to do.
"""


class ModiffError(Exception):
    """Base class of all errors raised by modiff."""


class ConfigError(ModiffError, ValueError):
    """A configuration field, recipe or command-line option is wrong."""


class TrajectoryError(ModiffError, RuntimeError):
    """The state of a trajectory was used in a way that would give wrong images."""


class CalibrationError(ModiffError, RuntimeError):
    """Calibration found no data, or data it cannot use."""


class CheckpointError(ModiffError, RuntimeError):
    """A file that should hold weights or results is missing, damaged or of another kind."""
