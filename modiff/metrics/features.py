"""A small feature network for images, for demonstrations without Inception weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modiff.errors import CheckpointError


class FeatureClassifier(nn.Module):
    """Convolutional classifier whose pooled features serve a Fréchet distance.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes of the labels.
        width: Channels of the first stage; the later stages have twice as many.
        num_features: Width of the pooled features. A Fréchet distance needs at least twice as many images as features.
        name: Printed beside every figure that was measured with this network.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 32,
        num_features: int = 32,
        name: str = "classifier",
    ) -> None:
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "num_features": num_features,
            "name": name,
        }
        self.name = name
        self.num_features = num_features
        self.body = nn.Sequential(
            *_stage(in_channels, width, stride=2),
            *_stage(width, 2 * width, stride=2),
            *_stage(2 * width, 2 * width, stride=2),
            *_stage(2 * width, num_features, stride=1),
        )
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features, float ``[N, num_features]``, of images ``[N, C, H, W]`` in [0, 1]."""
        return self.body(images * 2 - 1).mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``[N, num_classes]`` of images ``[N, C, H, W]`` in [0, 1]."""
        return self.head(self(images))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and configuration to one safetensors file."""
        save_file(self.state_dict(), str(path), metadata={"config": json.dumps(self.config)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureClassifier:
        """Read a network written by :meth:`save`.

        Raises:
            CheckpointError: The file is missing, truncated or of another kind.
        """
        from safetensors import safe_open

        if not Path(path).is_file():
            raise CheckpointError(
                f"Feature network {path} does not exist. Give the path of a file made by modiff train."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                config = json.loads((file.metadata() or {})["config"])
            network = cls(**config)
            network.load_state_dict(load_file(str(path)))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a feature network of modiff, or is damaged: {error}") from error
        return network.eval()


def _stage(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    ]


def load_feature_network(path: str | os.PathLike[str]) -> nn.Module:
    """Load a feature network: a modiff safetensors file, or any TorchScript file.

    A TorchScript network takes float images ``[N, C, H, W]`` in [0, 1] and returns ``[N, D]``.

    Raises:
        CheckpointError: The file is missing or unreadable.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return FeatureClassifier.load(path)
    if not path.is_file():
        raise CheckpointError(f"Feature network {path} does not exist. Give a .safetensors or TorchScript file.")
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise CheckpointError(f"{path} is not a TorchScript file: {error}") from error
    network.name = path.stem
    return network
