"""What a feature network gives for a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


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


def class_scores(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Class scores ``[N, K]`` of features ``[N, D]``: added up in float64, then rounded to the features' dtype.

    The last bit of a float32 product depends on the number of threads, and that on the number of ranks of a machine.

    Args:
        features: ``[N, D]``.
        weight: ``[K, D]``.
        bias: ``[K]``; None: there is none.
    """
    bias = None if bias is None else bias.double()
    return nn.functional.linear(features.double(), weight.double(), bias).to(features.dtype)
