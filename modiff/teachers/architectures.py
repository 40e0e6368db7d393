"""Architectures at full size with random weights, for figures of time and memory where the weights are not at hand."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from modiff.errors import ConfigError

_DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Ho et al. 2020, as google/ddpm-cifar10-32: 35.7M parameters.
    "ddpm-cifar10": {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    # Peebles & Xie 2023, table 1, on latents of 32x32x4.
    "dit-s-2-256": {**_DIT, "num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "dit-xl-2-256": {**_DIT, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
}
"""Configurations by name of the zoo; ``_class_name`` is diffusers' class."""


def random_denoiser(title: str, config: dict[str, Any] | None) -> nn.Module:
    """Make a denoiser with random weights, the same at every call; the global random numbers stay untouched.

    Args:
        title: Of the teacher, for the message.
        config: As in diffusers' ``config.json``; None: it is not known.

    Raises:
        ConfigError: The configuration is not known, or not of a class of diffusers.
    """
    if config is None:
        raise ConfigError(
            f"model.teacher.random needs the architecture of teacher {title!r}, which is not built in; built in are "
            f"mnist, {', '.join(ARCHITECTURES)}. Give model.teacher.path a folder that holds its unet/config.json or "
            "transformer/config.json."
        )
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ConfigError(
            f"The configuration of teacher {title!r} names the class {config.get('_class_name')!r}, which diffusers "
            "does not have. Correct config.json."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser: nn.Module = cls.from_config(config)
    return denoiser
