"""Errors between a student's and a teacher's images, or any two tensors, of the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from modiff.errors import CheckpointError, ConfigError

SSIM_WINDOW = 11
LPIPS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}  # by torchvision's names


def psnr_db(student: Tensor, teacher: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, data range 1: float64 ``[N]``, infinite where both are equal.

    Args:
        student: Images ``[N, C, H, W]``, clamped here to [0, 1].
        teacher: Images of the same noise and shape.

    Raises:
        ConfigError: The shapes differ.
    """
    _check_pair(student, teacher)
    difference = student.double().clamp(0, 1) - teacher.double().clamp(0, 1)
    return -10 * difference.square().flatten(1).mean(dim=1).log10()


def mean_psnr_db(student: Tensor, teacher: Tensor) -> float | None:
    """Mean of :func:`psnr_db` over the images that differ; None when all are identical.

    Raises:
        ConfigError: The shapes differ.
    """
    return finite_mean(psnr_db(student, teacher))


def finite_mean(values: Tensor) -> float | None:
    """Mean of per-image PSNRs ``[N]`` without the infinite ones (identical images); None when none is left.

    NaN is not left out: images that hold NaN must show.
    """
    values = values[~values.isposinf()]
    return float(values.double().mean()) if len(values) else None


def relative_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """``||s - t|| / ||t||`` of each image, in the tensors' own range: float64 ``[N]``; 0 where both are zero.

    Args:
        student: ``[N, ...]``.
        teacher: The same shape.

    Raises:
        ConfigError: The shapes differ.
    """
    _check_pair(student, teacher)
    difference = (student.double() - teacher.double()).flatten(1).norm(dim=1)
    return torch.where(difference == 0, 0.0, difference / teacher.double().flatten(1).norm(dim=1))


def mean_relative_l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of :func:`relative_l2` over dim 0; a scalar float64 tensor.

    Raises:
        ConfigError: The shapes differ.
    """
    return relative_l2(student, teacher).mean()


def ssim(student: Tensor, teacher: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004), data range 1, by torchmetrics: float ``[N]``.

    Gaussian window of 11 with sigma 1.5; the border is reflected and counted, where scikit-image leaves it out.

    Args:
        student: Images ``[N, C, H, W]``, clamped here to [0, 1]; at least 11x11.
        teacher: Images of the same noise and shape.

    Raises:
        ConfigError: The shapes differ, or the images are smaller than the window.
    """
    _check_pair(student, teacher)
    if student.ndim != 4 or min(student.shape[2:]) < SSIM_WINDOW:
        raise ConfigError(
            f"SSIM needs images [N, C, H, W] of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {list(student.shape)}. "
            "Leave it out for smaller images."
        )
    student, teacher = student.float().clamp(0, 1), teacher.float().clamp(0, 1)
    values = structural_similarity_index_measure(student, teacher, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # a tuple only where the full image of similarities is asked for
    return values


class PerceptualDistance(nn.Module):
    """LPIPS (Zhang et al. 2018) of each pair of images, by torchmetrics; of the extra ``modiff[lpips]``.

    Args:
        network: ``"alex"``, ``"vgg"`` or ``"squeeze"``: torchvision's weights, from torch.hub's cache. Nothing is
            downloaded.

    Raises:
        ConfigError: torchvision is not installed, does not fit this torch, or the network is unknown.
        CheckpointError: The weights are not in the cache.
    """

    def __init__(self, network: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        super().__init__()
        if network not in LPIPS:
            raise ConfigError(f"LPIPS network must be alex, vgg or squeeze; got {network!r}.")
        weights = _cached_weights(network)
        if not weights.is_file():
            raise CheckpointError(
                f"The weights of LPIPS network {network!r} are not in {weights.parent}. Run once, connected: "
                f"python -c \"import torchvision; torchvision.models.{LPIPS[network]}(weights='DEFAULT')\"."
            )
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(network, normalize=True)
        self.name = f"lpips-{network}"
        self.network = metric.net

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance ``[N]`` of images ``[N, 1 or 3, H, W]``, clamped here to [0, 1]; grey ones are repeated.

        Raises:
            ConfigError: The shapes differ, or there are neither one nor three channels.
        """
        _check_pair(student, teacher)
        if student.ndim != 4 or student.shape[1] not in (1, 3):
            raise ConfigError(
                f"LPIPS takes images [N, 1 or 3, H, W], got {list(student.shape)}. Leave it out for these."
            )
        images = [x.float().clamp(0, 1).expand(-1, 3, -1, -1) for x in (student, teacher)]
        with torch.no_grad():
            return self.network(*images, normalize=True).reshape(len(student))


def _cached_weights(network: str) -> Path:
    """Where torchvision keeps the weights of an LPIPS network.

    Raises:
        ConfigError: torchvision is not installed, or was built for another torch.
    """
    try:
        from torchvision.models import get_model_weights
    except (ImportError, OSError, RuntimeError) as error:  # one built for another torch raises RuntimeError
        raise ConfigError(
            f"LPIPS needs torchvision, which is not installed or does not fit this torch ({error}). "
            "Run: pip install 'modiff[lpips]'."
        ) from error
    url: str = get_model_weights(LPIPS[network]).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.ndim < 2:
        raise ConfigError(
            f"Student {list(student.shape)} and teacher {list(teacher.shape)} must have the same shape [N, ...]. "
            "Compare images of the same noise and batch."
        )
