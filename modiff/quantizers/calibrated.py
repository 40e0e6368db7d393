"""What a calibration found for one operator's quantizer: scale and zero point, for each bucket of time steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modiff.config.specs import QuantSpec
from modiff.errors import CalibrationError
from modiff.quantizers.affine import scale_from_range


@dataclass(frozen=True)
class CalibratedRange:
    """Scales and zero points that do not depend on the data any more; one object holds both (trap 6).

    Evaluation ``i`` of a trajectory uses bucket ``i * buckets // length``.

    Args:
        scale: Float32 ``[buckets, sets]``; the sets are those of the granularity: 1, channels or groups.
        zero_point: Whole numbers in the same dtype and shape; None for symmetric quantizers.
        length: Evaluations of the trajectories that it was calibrated on.

    Raises:
        CalibrationError: There are more buckets than evaluations, or shapes differ.
    """

    scale: Tensor
    zero_point: Tensor | None
    length: int

    def __post_init__(self) -> None:
        if self.scale.ndim != 2 or (self.zero_point is not None and self.zero_point.shape != self.scale.shape):
            zero_point = None if self.zero_point is None else list(self.zero_point.shape)
            raise CalibrationError(
                f"scale has shape {list(self.scale.shape)} and zero_point {zero_point}; both are [buckets, sets]."
            )
        check_buckets(self.buckets, self.length)

    def check_values(self) -> None:
        """Refuse numbers that nothing can be quantized with; reads them from the device.

        Raises:
            CalibrationError: A scale is not a positive number, or a zero point is not finite.
        """
        if not (torch.isfinite(self.scale) & (self.scale > 0)).all():
            raise CalibrationError("A calibrated scale is not a positive number. Calibrate again.")
        if self.zero_point is not None and not torch.isfinite(self.zero_point).all():
            raise CalibrationError("A calibrated zero point is NaN or Inf. Calibrate again.")

    @classmethod
    def from_range(cls, low: Tensor, high: Tensor, spec: QuantSpec, length: int) -> CalibratedRange:
        """From smallest and largest values ``[buckets, sets]``, which ``spec.clip`` multiplies as it does dynamic ones.

        >>> found = CalibratedRange.from_range(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), QuantSpec(2), length=10)
        >>> found.scale, found.zero_point
        (tensor([[2.]]), None)
        """
        return cls(*scale_from_range(low.float(), high.float(), spec), length)

    @property
    def buckets(self) -> int:
        """How many there are."""
        return self.scale.shape[0]

    @property
    def sets(self) -> int:
        """How many scales each bucket has."""
        return self.scale.shape[1]

    def at(self, evaluation: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point ``[sets]`` of an evaluation (from 0)."""
        bucket = bucket_of(evaluation, self.buckets, self.length)
        return self.scale[bucket], None if self.zero_point is None else self.zero_point[bucket]

    def to(self, device: torch.device) -> CalibratedRange:
        """The same on another device; the dtype stays."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return replace(self, scale=self.scale.to(device), zero_point=zero_point)


def bucket_of(evaluation: int, buckets: int, length: int) -> int:
    """The bucket of an evaluation, from 0; buckets differ in size by one at most.

    >>> [bucket_of(i, buckets=3, length=7) for i in range(7)]
    [0, 0, 0, 1, 1, 2, 2]
    """
    return evaluation * buckets // length


def check_buckets(buckets: int, length: int) -> None:
    """Refuse buckets that no evaluation falls into.

    Raises:
        CalibrationError: There are more of them than evaluations.
    """
    if buckets > length:
        raise CalibrationError(
            f"timestep_buckets is {buckets}, but a trajectory has {length} evaluations only. Use at most {length}."
        )


def ranges_to_tensors(found: Mapping[str, CalibratedRange]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors on the CPU by name, and lengths of trajectories: for storage, or to be sent to other ranks."""
    tensors = {}
    for name, each in found.items():
        tensors[f"{name}.activation.scale"] = each.scale.cpu().contiguous()
        if each.zero_point is not None:
            tensors[f"{name}.activation.zero_point"] = each.zero_point.cpu().contiguous()
    return tensors, {name: each.length for name, each in found.items()}


def ranges_from_tensors(tensors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> dict[str, CalibratedRange]:
    """The inverse of :func:`ranges_to_tensors`."""
    return {
        name: CalibratedRange(tensors[f"{name}.activation.scale"], tensors.get(f"{name}.activation.zero_point"), length)
        for name, length in lengths.items()
    }
