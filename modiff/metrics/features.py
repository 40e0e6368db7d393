"""Networks that turn images into features: what they offer, a small one of our own, and how to load one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.feature_outputs import FeatureOutputs, class_scores

INCEPTION = "inception"


class RichFeatureNetwork(Protocol):
    """A feature network that offers more than pooled features; any other module that returns ``[N, D]`` serves too.

    Attributes:
        name: Printed beside every figure.
        num_features: D of the pooled features.
        num_spatial: S of the spatial features, None without them.
        num_classes: K of the class scores, None without them.
    """

    name: str
    num_features: int
    num_spatial: int | None
    num_classes: int | None

    def outputs(self, images: Tensor) -> FeatureOutputs:
        """Everything at once for float images ``[N, C, H, W]`` in [0, 1]."""
        ...


def network_name(network: nn.Module) -> str:
    """Name of a feature network: its ``name``, or else its class."""
    return str(getattr(network, "name", type(network).__name__))


def extract(network: nn.Module, images: Tensor) -> FeatureOutputs:
    """Run a feature network once, without gradients and in float32 under autocast too.

    Args:
        network: Any module from ``[N, C, H, W]`` to ``[N, D]``, or a :class:`RichFeatureNetwork`.
        images: Float ``[N, C, H, W]`` in [0, 1].

    Raises:
        ConfigError: The network does not take such images, or does not return one row of features per image.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        try:
            rich = getattr(network, "outputs", None)
            outputs = rich(images.float()) if callable(rich) else FeatureOutputs(network(images.float()))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"Feature network {network_name(network)!r} failed on images {list(images.shape)} on {images.device}: "
                f"{error}. Use a network made for images of this size and number of channels, on the same device."
            ) from error
    shape = getattr(outputs.features, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(images):
        got = type(outputs.features).__name__ if shape is None else list(shape)
        raise ConfigError(
            f"Feature network {network_name(network)!r} must return [N, D] features, one row per image; "
            f"it returned {got} for {len(images)} images."
        )
    return outputs


def count_features(network: nn.Module, images: Tensor | None = None) -> int:
    """Dimension D of the pooled features: the network's ``num_features``, or else measured on ``images``.

    Raises:
        ConfigError: The network does not say, and no images were given.
    """
    declared = getattr(network, "num_features", None)
    if isinstance(declared, int):
        return declared
    if images is None:
        raise ConfigError(
            f"Feature network {network_name(network)!r} does not say how many features it has. Give num_features; "
            "count_features(network, images) measures it on a batch of images."
        )
    return extract(network, images).features.shape[1]


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
        self.num_classes = num_classes
        self.num_spatial = None
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

    def outputs(self, images: Tensor) -> FeatureOutputs:
        """Pooled features and class scores in one pass; no spatial features."""
        features = self(images)
        return FeatureOutputs(features, logits=class_scores(features, self.head.weight, self.head.bias))

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
    """Load a feature network: a modiff safetensors file, any TorchScript file, or ``"inception"``.

    A TorchScript network takes float images ``[N, C, H, W]`` in [0, 1] and returns ``[N, D]``; its name is the
    file's. ``"inception"`` is torch-fidelity's Inception-v3, of the extra ``modiff[fidelity]``.

    Raises:
        CheckpointError: The file is missing or unreadable.
        ConfigError: ``"inception"`` without torch-fidelity.
    """
    if str(path) == INCEPTION:
        from modiff.metrics.inception import InceptionV3  # an optional extra: imported only when asked for

        return InceptionV3()
    path = Path(path)
    if path.suffix == ".safetensors":
        return FeatureClassifier.load(path)
    if not path.is_file():
        raise CheckpointError(
            f"Feature network {path} does not exist. Give a .safetensors file, a TorchScript file or {INCEPTION!r}."
        )
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a TorchScript file: {error}") from error
    network.name = path.stem
    return network
