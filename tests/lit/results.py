"""Results as the tests of tables and pages take them."""

from __future__ import annotations

import copy
from typing import Any

from modiff.lit.report.result import Result

METRICS = {
    "teacher": {"fid": 2.941},
    "student": {"fid": 3.217, "fid_to_teacher": 0.8531, "psnr_db": 40.714, "relative_l2": 0.01234},
    "features": {"network": "digits-net", "num_features": 32, "num_images": 128},
    "cost": {
        "gbops_per_evaluation": 1.6,
        "other_gbops_per_evaluation": 0.4,
        "other_weight_mib": 0.007,
        "teacher_gbops_per_evaluation": 38.4,
        "weight_mib": 1.634,
        "teacher_weight_mib": 6.412,
        "state_mib_per_image": 2.345,
    },
    "evaluations": {"total": 50, "quantized": 49},
    "num_images": 128,
    "seconds": 81.3,
    "seconds_per_image_evaluation": {"teacher": 0.0041, "student": 0.0066},
    "time_ratio": 1.61,
    "seed": 7,
    "provenance": {"git_commit": "abc123", "gpu": None, "recipe_hash": "feed5eed"},
}
ERRORS = {
    "timesteps": [900, 600, 300],
    "operators": ["conv_in", "mid.conv", "conv_out"],
    "operator_error": [[None, 0.01, 0.03], [None, 0.2, 0.4], [0.0, 0.05, 0.07]],
    "sample_error": [0.0, 0.011, 0.0123],
}
COST = [
    {
        "name": f"op{i}",
        "macs": 1e6 * i,
        "weight_bits": 8,
        "activation_bits": 4,
        "gbops": 0.01 * i,
        "state_mib": 0.1,
        "constant": i == 12,
        "weight_mib": 0.02 * i,
    }
    for i in range(14)
]


def result(metrics: dict[str, Any] = METRICS, errors: Any = ERRORS, operators: Any = COST) -> Result:
    """The content of a ``metrics.json`` as a result."""
    found = Result.from_json(copy.deepcopy(metrics))
    found.errors, found.operators = errors, operators
    return found


def changed(**student: Any) -> Result:
    """With other figures of the student."""
    return result({**METRICS, "student": METRICS["student"] | student})


def nulls(images: int = 40) -> Result:
    """Without PSNR and Fréchet distances."""
    few = f"64 student images are needed, {images} were drawn (twice the 32 features of digits-net)"
    metrics = {
        **METRICS,
        "teacher": {"fid": None},
        "student": {"fid": None, "fid_to_teacher": None, "psnr_db": None, "relative_l2": 0.0},
        "features": METRICS["features"] | {"num_images": images},
        "reasons": {"student.fid_to_teacher": few, "student.fid": few, "teacher.fid": "no reference images were given"},
    }
    return result(metrics)
