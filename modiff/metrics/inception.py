"""Inception-v3 with the weights that published FID, sFID and inception scores are measured with (torch-fidelity)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.feature_outputs import FeatureOutputs, class_scores

SPATIAL_CHANNELS = 7
SPATIAL_SIZE = 17


class InceptionV3(nn.Module):
    """torch-fidelity's port of the TensorFlow network of 2015, with the spatial features of the sFID beside it.

    Images are rounded to 8 bits and resized to 299x299 as in the published protocol; grey ones are repeated into
    three channels. The sFID takes the first seven channels of ``mixed_6/conv`` (Nash et al. 2021), here
    ``Mixed_6d.branch1x1``, flattened as ``[H, W, C]`` like the statistics of guided-diffusion. The class scores are
    without bias, as in the published inception score.

    Raises:
        ConfigError: torch-fidelity is not installed.
        CheckpointError: Its weights are neither in torch.hub's cache nor can they be downloaded.
    """

    name = "inception-v3"
    num_features = 2048
    num_spatial = SPATIAL_CHANNELS * SPATIAL_SIZE * SPATIAL_SIZE
    num_classes = 1008

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise ConfigError(
                f"Feature network 'inception' needs torch-fidelity, which is not installed or lacks a part: {error}. "
                "Run: pip install 'modiff[fidelity]'; or give a TorchScript or .safetensors file."
            ) from error
        try:
            self.extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"The weights of feature network 'inception' could not be loaded: {error}. "
                f"Download {URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints."
            ) from error
        self._spatial: Tensor | None = None
        self.extractor.Mixed_6d.branch1x1.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features ``[N, 2048]`` of float images ``[N, 1 or 3, H, W]`` in [0, 1]."""
        return self.outputs(images).features

    def outputs(self, images: Tensor) -> FeatureOutputs:
        """Pooled features, spatial features and class scores of float images ``[N, 1 or 3, H, W]`` in [0, 1].

        Raises:
            ConfigError: The images have neither one nor three channels.
        """
        if images.shape[1] not in (1, 3):
            raise ConfigError(
                f"Feature network 'inception' takes images of 1 or 3 channels, got {images.shape[1]}. "
                "Give a TorchScript network made for these images."
            )
        bytes_ = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        (features,) = self.extractor(bytes_)
        spatial, self._spatial = self._spatial, None
        return FeatureOutputs(features, spatial, class_scores(features, self.extractor.fc.weight))
