"""A UNet that sees patches of pixels: the 32x32 images of a small teacher at the cost of 16x16."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from modiff.errors import ConfigError


class PatchedUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` on images whose patches were moved to the channels, and moved back at its output.

    With ``patch_size=2`` the network runs at half the height and width, which quarters its cost. The other arguments
    are those of ``UNet2DModel`` and speak of the images: ``sample_size=32, in_channels=3`` are images of 32x32 in RGB.

    Args:
        patch_size: Height and width of a patch; 1: the class it is derived from.

    Raises:
        ConfigError: ``sample_size`` is not a multiple of ``patch_size``.

    >>> import torch
    >>> down, up = ("DownBlock2D",), ("UpBlock2D",)
    >>> unet = PatchedUNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8,
    ...     layers_per_block=1, down_block_types=down, up_block_types=up)
    >>> unet.conv_in.in_channels, unet.config.in_channels, tuple(unet(torch.zeros(1, 3, 8, 8), 0).sample.shape)
    (12, 3, (1, 3, 8, 8))
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        sample_size: int | None = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        layers_per_block: int = 2,
        block_out_channels: tuple[int, ...] = (64, 96, 128),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups: int = 32,
        attention_head_dim: int | None = 8,
        dropout: float = 0.0,
    ) -> None:
        if patch_size < 1 or (sample_size or 0) % patch_size:
            raise ConfigError(
                f"patch_size is {patch_size}, but the images are {sample_size} pixels wide. Give a divisor of that."
            )
        own = {"sample_size": sample_size, "in_channels": in_channels, "out_channels": out_channels}
        super().__init__(
            sample_size=sample_size // patch_size if sample_size else None,
            in_channels=in_channels * patch_size**2,
            out_channels=out_channels * patch_size**2,
            layers_per_block=layers_per_block,
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
            dropout=dropout,
        )
        self.register_to_config(**own)  # the class it is derived from wrote those of the patches

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a saved config, in which the base class wrote its other arguments too: they have their defaults."""
        own, base = (set(inspect.signature(c.__init__).parameters) for c in (cls, UNet2DModel))
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in base - own}, **kwargs)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict for ``sample`` ``[B, C, H, W]``; H and W are multiples of the patch times what the UNet halves."""
        patch = self.config.patch_size
        inner = super().forward(nn.functional.pixel_unshuffle(sample, patch), timestep, class_labels, return_dict=False)
        output = nn.functional.pixel_shuffle(inner[0], patch)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def make_denoiser(arguments: dict[str, Any]) -> UNet2DModel:
    """A denoiser to be trained: ``PatchedUNet2DModel`` where ``patch_size`` is given, else ``UNet2DModel``."""
    return PatchedUNet2DModel(**arguments) if "patch_size" in arguments else UNet2DModel(**arguments)


__all__ = ["PatchedUNet2DModel", "make_denoiser"]
