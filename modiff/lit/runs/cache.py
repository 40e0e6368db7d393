"""The key under which a finished calibration is kept."""

from __future__ import annotations

from typing import Any

import torch

from modiff.calibration.calibrate import ALGORITHM_VERSION
from modiff.storage.hashing import short_hash


def calibration_key(parts: dict[str, Any]) -> str:
    """Content hash of a calibration: the same parts, algorithm and PyTorch have the same result."""
    return short_hash({**parts, "algorithm": ALGORITHM_VERSION, "torch": torch.__version__})
