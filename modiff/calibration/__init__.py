"""Calibration: weights and ranges found from what the student's own trajectories show."""

from modiff.calibration.calibrate import calibrate
from modiff.calibration.settings import CalibrationSettings

__all__ = ["CalibrationSettings", "calibrate"]
