"""Mean, covariance and some features of an image set, and the Fréchet distance between two of them."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.image.fid import _compute_fid

from modiff.errors import CheckpointError, ConfigError
from modiff.storage.atomic import write_file


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What a Fréchet distance, and precision and recall, need to know about a set of images.

    Args:
        mean: Mean feature, ``[D]``; kept in float64 on the CPU.
        covariance: Unbiased covariance of the features, ``[D, D]``; kept in float64 on the CPU.
        num_images: Images behind the statistics; None where a foreign file does not say.
        network: Name of the feature network; None where a foreign file does not say.
        spatial_mean: Mean spatial feature ``[S]`` for the sFID, or None.
        spatial_covariance: Its covariance ``[S, S]``, or None.
        features: Features of some of the images ``[K, D]`` for precision and recall, kept in float32 on the CPU; None
            in files of other tools and of ``modiff statistics``. They take ``4 * K * D`` bytes.

    Raises:
        ConfigError: A shape does not fit, or a value is not finite.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None
    network: str | None = None
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.spatial_mean is None) != (self.spatial_covariance is None):
            raise ConfigError("spatial_mean and spatial_covariance of feature statistics come together; give both.")
        for prefix in ("", "spatial_"):
            mean, covariance = getattr(self, f"{prefix}mean"), getattr(self, f"{prefix}covariance")
            if mean is None:
                continue
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ConfigError(
                    f"Feature statistics need a {prefix}mean [D] and a {prefix}covariance [D, D]; "
                    f"got {list(mean.shape)} and {list(covariance.shape)}."
                )
            if not (mean.isfinite().all() and covariance.isfinite().all()):
                raise ConfigError(f"{prefix}mean or {prefix}covariance of feature statistics holds NaN or Inf.")
            object.__setattr__(self, f"{prefix}mean", mean.detach().double().cpu())
            object.__setattr__(self, f"{prefix}covariance", covariance.detach().double().cpu())
        if self.features is not None:
            self._check_features(self.features)
            object.__setattr__(self, "features", self.features.detach().float().cpu())

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ConfigError(
                f"The features of feature statistics need the shape [K, {self.num_features}], as wide as their mean; "
                f"got {list(features.shape)}."
            )
        if not features.isfinite().all():
            raise ConfigError("The features of feature statistics hold NaN or Inf.")

    @property
    def num_features(self) -> int:
        """Dimension D of the features."""
        return len(self.mean)

    @property
    def spatial(self) -> FeatureStatistics | None:
        """The spatial features as statistics of their own, or None."""
        if self.spatial_mean is None or self.spatial_covariance is None:
            return None
        return FeatureStatistics(self.spatial_mean, self.spatial_covariance, self.num_images, self.network)

    @classmethod
    def from_features(
        cls, features: Tensor, network: str | None = None, spatial: Tensor | None = None
    ) -> FeatureStatistics:
        """Statistics of features ``[N, D]`` and, where given, spatial features ``[N, S]``.

        Raises:
            ConfigError: There are fewer than two images.
        """
        if len(features) < 2:
            raise ConfigError(f"A covariance needs at least 2 images, got {len(features)}. Give more images.")
        mean, covariance = _moments(features)
        spatial_mean, spatial_covariance = (None, None) if spatial is None else _moments(spatial)
        return cls(mean, covariance, len(features), network, spatial_mean, spatial_covariance)

    def check(self, network: str, num_features: int, num_spatial: int | None = None) -> None:
        """Make sure that features of this network may be compared with these statistics.

        Raises:
            ConfigError: They come from another network, or have another dimension.
        """
        mine = self.network or "a network the file does not name"
        if self.network is not None and self.network != network:
            raise ConfigError(
                f"The reference statistics are of feature network {mine!r}, but {network!r} is in use. "
                "Use the same network for both, or make the statistics again."
            )
        pairs = [("", self.num_features, num_features)]
        if self.spatial_mean is not None and num_spatial is not None:
            pairs.append((" spatial", len(self.spatial_mean), num_spatial))
        for kind, given, used in pairs:
            if given != used:
                raise ConfigError(
                    f"The reference statistics have {given}{kind} features ({mine}), but feature network {network!r} "
                    f"has {used}. Use the same network for both, or make the statistics again."
                )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read a ``.safetensors`` file of :meth:`save`, or a ``.npz`` with ``mu`` and ``sigma``.

        The ``.npz`` layouts of pytorch-fid and clean-fid hold these two; guided-diffusion adds ``mu_s`` and
        ``sigma_s`` of the spatial features.

        Raises:
            CheckpointError: The file is missing, damaged or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                f"Feature statistics {path} do not exist. Give a .safetensors file written by modiff, "
                "or a .npz file with mu and sigma."
            )
        try:
            return cls(**(_read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)))
        except (SafetensorError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path} holds no feature statistics, or is damaged: {error}. Allowed are .safetensors files written "
                "by modiff and .npz files with mu and sigma."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically: readers see the old file or the new one."""
        path = Path(path)
        tensors = {
            "mean": self.mean,
            "covariance": self.covariance,
            "spatial_mean": self.spatial_mean,
            "spatial_covariance": self.spatial_covariance,
            "features": self.features,
            "num_images": None if self.num_images is None else torch.tensor(self.num_images),
        }
        metadata = None if self.network is None else {"network": self.network}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        write_file(path, lambda temporary: save_file(kept, temporary, metadata=metadata))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians (Heusel et al. 2017, equation 6), in float64.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``, by torchmetrics. The spatial features do not enter.

    Raises:
        ConfigError: The two have different networks or dimensions.
    """
    a.check(b.network or a.network or "", b.num_features)
    distance = float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance))
    return max(distance, 0.0)  # equal statistics may come out as -1e-14


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(dim=0), torch.atleast_2d(torch.cov(features.T))


def _read_safetensors(path: Path) -> dict[str, Any]:
    names = ("mean", "covariance", "spatial_mean", "spatial_covariance", "features", "num_images")
    with safe_open(str(path), framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118 (no mapping)
        network = (file.metadata() or {}).get("network")
    missing = {"mean", "covariance"} - stored.keys()
    if missing:
        raise ValueError(f"no tensor named {' or '.join(sorted(missing))}")
    num_images = stored.pop("num_images", None)
    return {**stored, "num_images": None if num_images is None else int(num_images), "network": network}


def _read_npz(path: Path) -> dict[str, Any]:
    names = {"mu": "mean", "sigma": "covariance", "mu_s": "spatial_mean", "sigma_s": "spatial_covariance"}
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        if "mu" not in file or "sigma" not in file:
            raise ValueError(f"it has the arrays {sorted(file.files)}, not mu and sigma")
        return {ours: torch.from_numpy(file[theirs]) for theirs, ours in names.items() if theirs in file}
