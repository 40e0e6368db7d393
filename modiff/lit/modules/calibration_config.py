"""``model.calibration`` of a recipe: how the student's weights and ranges are found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from modiff.calibration import CalibrationSettings
from modiff.calibration.weights import weight_method
from modiff.errors import CalibrationError, ConfigError
from modiff.student.swap import operators

NOISE_STREAM = 2**40
"""Added to the stream of a calibration's noise: far beyond the time steps of any sampler, whose streams begin at 0."""


@dataclass(frozen=True)
class CalibrationConfig(CalibrationSettings):
    """How the student's weights are found: ``model.calibration`` of a recipe, on top of the library's settings.

    Args:
        method: ``nearest``, ``lp``, ``gptq``, ``adaround``, ``brecq`` or any registered one; see
            :func:`modiff.calibration.calibrate`.
        num_images: Images drawn with the student for each of its runs; the ranks share them.
        images_per_batch: Images drawn together: one trajectory.
        seed: Of the noise, of what is recorded and of the batches. The noise is never that of the images that are
            drawn with the same seed.

    Raises:
        ConfigError: A field is out of range.
    """

    method: str = "gptq"
    num_images: int = 16
    images_per_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        weight_method(self.method)
        for name, low in (("num_images", 1), ("images_per_batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}; allowed are whole numbers of at least {low}.")

    @property
    def settings(self) -> CalibrationSettings:
        """The settings that :func:`modiff.calibration.calibrate` takes."""
        return CalibrationSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(CalibrationSettings)})

    @classmethod
    def from_dict(cls, values: Any) -> CalibrationConfig:
        """Build from a plain mapping, as :func:`dataclasses.asdict` writes it.

        Raises:
            ConfigError: A field is unknown or wrong.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"{values!r} is no calibration; give null, or a mapping with {', '.join(known)}.")
        unknown = sorted(set(map(str, values)) - set(known))
        if unknown:
            raise ConfigError(f"there is no field {unknown[0]!r}; allowed are {', '.join(known)}.")
        return cls(**values)


def refuse_useless_calibration(student: nn.Module, calibration: CalibrationConfig | None) -> None:
    """Refuse a calibration that has nothing to find, and calibrated ranges without a calibration.

    Raises:
        CalibrationError: One of them.
    """
    found = operators(student).values()
    if calibration is None:
        if any(op.activation_spec is not None and op.activation_spec.range == "calibrated" for op in found):
            raise CalibrationError(
                "The recipe has range: calibrated, but no calibration. Add one, such as --model.calibration.method "
                "nearest, which finds ranges only, or give a checkpoint that has them: --ckpt."
            )
    elif calibration.method != "nearest" and all(op.weight_spec is None for op in found):
        raise CalibrationError(
            f"model.calibration.method is {calibration.method!r}, which finds weights, but the recipe "
            "quantizes none. Give model.config.weight, or set model.calibration to null."
        )
