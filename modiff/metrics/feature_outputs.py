"""What a feature network gives for a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FeatureOutputs:
    """What one pass of a feature network gives for images ``[N, C, H, W]``.

    Args:
        features: Pooled features ``[N, D]`` for FID and precision/recall.
        spatial: Features that keep positions ``[N, S]`` for the sFID, or None.
        logits: Class scores ``[N, K]`` for the inception score, or None.
    """

    features: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
