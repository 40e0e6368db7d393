"""SSIM and LPIPS of the student's images to the teacher's, and CLIP scores of both; over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from modiff.errors import CheckpointError, ConfigError, ModiffError
from modiff.metrics.clip import CLIP, ClipScore
from modiff.metrics.pairwise import SSIM_WINDOW, PerceptualDistance, ssim

_Network = TypeVar("_Network", bound=nn.Module)
SCORES = ("teacher.clip_score", "student.clip_score")


class Similarity:
    """What needs no feature statistics. A figure that cannot be given is absent, and ``reasons`` says why.

    Args:
        image_shape: ``(C, H, W)`` of the images.
        prompted: Whether the teacher draws from prompts.
        clip: CLIP model; None: :data:`modiff.metrics.clip.CLIP`, where it is on this machine.

    Raises:
        ConfigError: ``clip`` is given, but the teacher takes no prompts or transformers is not installed.
        CheckpointError: ``clip`` is given, but is not on this machine.
    """

    def __init__(self, image_shape: tuple[int, int, int], prompted: bool = False, clip: str | None = None) -> None:
        if clip is not None and not prompted:
            raise ConfigError(f"model.clip is {clip!r}, but this teacher draws without prompts. Remove it.")
        self.reasons: dict[str, str] = {}
        self.has_ssim = min(image_shape[1:]) >= SSIM_WINDOW
        if not self.has_ssim:
            self.reasons["student.ssim"] = f"it needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels"
        self.lpips = self._optional(("student.lpips",), lambda: _tried(image_shape))
        self.clip: ClipScore | None = None
        if clip is not None:
            self.clip = ClipScore(clip)
        elif prompted:
            self.clip = self._optional(SCORES, lambda: ClipScore(CLIP))
        else:
            self.reasons.update(dict.fromkeys(SCORES, "this teacher draws without prompts"))
        names = ("ssim", "lpips", "teacher", "student", "images", "prompted")
        # Float64, so that the order of batches and ranks does not show.
        self.sums = {name: SumMetric().set_dtype(torch.float64) for name in names}

    def _optional(self, keys: tuple[str, ...], build: Callable[[], _Network]) -> _Network | None:
        try:
            return build()
        except ModiffError as error:
            self.reasons.update(dict.fromkeys(keys, str(error)))
            return None

    def to(self, device: torch.device) -> None:
        """Move networks and sums."""
        for part in (self.lpips, self.clip, *self.sums.values()):
            if part is not None:
                part.to(device)

    def update(self, student: Tensor, teacher: Tensor, prompts: Sequence[Any] | None) -> None:
        """Take the images of a batch, ``[N, C, H, W]`` in [0, 1] of the same noise, and their prompts."""
        # Every sum is updated, also by a rank without images: torchmetrics warns of those that never were.
        values: dict[str, Tensor | float] = dict.fromkeys(self.sums, 0.0)
        if len(student):
            values["images"] = float(len(student))
            if self.has_ssim:
                values["ssim"] = ssim(student, teacher).double().sum()
            if self.lpips is not None:
                values["lpips"] = self.lpips(student, teacher).double().sum()
        if len(student) and self.clip is not None and prompts is not None:
            texts = [str(text) for text in prompts]
            values["prompted"] = float(len(texts))
            for who, images in (("teacher", teacher), ("student", student)):
                values[who] = self.clip(images, texts).double().sum()
        for name, value in values.items():
            self.sums[name].update(value)

    def compute(self) -> dict[str, dict[str, Any]]:
        """Means over all images by ``teacher`` and ``student``; ``features``: names of the networks; ``reasons``."""
        sums = {name: float(metric.compute()) for name, metric in self.sums.items()}
        found: dict[str, dict[str, Any]] = {"teacher": {}, "student": {}, "features": {}, "reasons": dict(self.reasons)}
        if self.has_ssim:
            found["student"]["ssim"] = sums["ssim"] / sums["images"]
        if self.lpips is not None:
            found["student"]["lpips"] = sums["lpips"] / sums["images"]
            found["features"]["lpips"] = self.lpips.name
        if self.clip is not None and not sums["prompted"]:
            found["reasons"].update(dict.fromkeys(SCORES, "data gives no prompts"))
        elif self.clip is not None:
            for who in ("teacher", "student"):
                found[who]["clip_score"] = sums[who] / sums["prompted"]
            found["features"]["clip"] = self.clip.name
        return found


def _tried(image_shape: tuple[int, int, int]) -> PerceptualDistance:
    """LPIPS, tried on black images: its networks need more than a few pixels."""
    distance = PerceptualDistance()
    try:
        distance(torch.zeros(1, *image_shape), torch.zeros(1, *image_shape))
    except RuntimeError as error:
        channels, height, width = image_shape
        raise CheckpointError(
            f"{distance.name} takes no images of {height}x{width} pixels and {channels} channels"
        ) from error
    return distance
