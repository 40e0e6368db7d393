"""Tiny random models of every family, for trying recipes without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "sample_size": 16,
}


def _unet2d(**arguments: Any) -> nn.Module:
    return diffusers.UNet2DModel(
        **_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **arguments,
    )


def _conditional(**arguments: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        **arguments,
    )


def _kl(shift: float | None = None) -> nn.Module:
    return diffusers.AutoencoderKL(**_KL, latent_channels=4, scaling_factor=0.5, shift_factor=shift)


def _shifted_kl() -> nn.Module:
    return _kl(0.1)


def _vq() -> nn.Module:
    return diffusers.VQModel(**_KL, latent_channels=3, vq_embed_dim=3, num_vq_embeddings=32, scaling_factor=1.0)


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )


def _sdxl() -> nn.Module:
    return _conditional(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
    )


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=16,
        norm_num_groups=4,
        use_additional_conditions=False,
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )


def _flux(guidance: bool) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )


def _sana() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )


def _dc() -> nn.Module:
    blocks = {f"{way}_block_types": "ResBlock" for way in ("encoder", "decoder")}
    widths = {f"{way}_block_out_channels": (8, 8) for way in ("encoder", "decoder")}
    layers = {f"{way}_layers_per_block": (1, 1) for way in ("encoder", "decoder")}
    scales = {f"{way}_qkv_multiscales": ((), ()) for way in ("encoder", "decoder")}
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=8,
        scaling_factor=0.5,
        **blocks,
        **widths,
        **layers,
        **scales,
    )


_BUILDERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module] | None]] = {
    "pixel": (_unet2d, None),
    "latent": (lambda: _unet2d(in_channels=3, out_channels=3), _vq),
    "latent-kl": (lambda: _unet2d(in_channels=4, out_channels=4), _kl),
    "dit": (_dit, _kl),
    "sd": (_conditional, _kl),
    "sdxl": (_sdxl, _kl),
    "pixart": (_pixart, _kl),
    "sd3": (_sd3, _shifted_kl),
    "flux": (lambda: _flux(False), _shifted_kl),
    "flux-guidance": (lambda: _flux(True), _shifted_kl),
    "sana": (_sana, _dc),
}


def tiny_model(kind: str, channels: int = 3) -> tuple[nn.Module, nn.Module | None]:
    """Make a random denoiser and decoder of a family, the same at every call, without global random numbers.

    Args:
        kind: A family, or one of its variants ``latent-kl`` (AutoencoderKL), ``flux-guidance`` (guidance as an input).
        channels: Of the images, for ``pixel``.
    """
    denoiser, decoder = _BUILDERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "pixel":
            return _unet2d(in_channels=channels, out_channels=channels), None
        return denoiser(), decoder() if decoder is not None else None
