"""Unconditional latent diffusion models of CompVis (``model.ckpt``: UNet and first stage) as diffusers modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from modiff.errors import CheckpointError
from modiff.teachers.convert.checkpoints import Source, State, count, fill, require, strip
from modiff.teachers.convert.first_stage import convert_first_stage

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."


class FixedHeadsUNet2DModel(UNet2DModel):
    """A ``UNet2DModel`` with the same number of attention heads at every width (LSUN-Churches: 8).

    diffusers' own class fixes the width of a head instead. Takes the arguments below; the rest is as in CompVis' UNets.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 8,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        layers_per_block: int = 2,
        block_out_channels: tuple[int, ...] = (192, 384, 384, 768, 768),
        down_block_types: tuple[str, ...] = ("AttnDownBlock2D",) * 5,
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 5,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        resnet_time_scale_shift: str = "default",
        attn_norm_num_groups: int = 32,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            resnet_time_scale_shift=resnet_time_scale_shift,
            attn_norm_num_groups=attn_norm_num_groups,
            attention_head_dim=None,
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.heads = module.sliceable_head_dim = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5


@dataclass(frozen=True)
class LatentModel:
    """A converted latent diffusion model; ``first_stage.config.scaling_factor`` holds the scale of the latents.

    Args:
        unet: Predicts the noise of scaled latents.
        first_stage: Images to latents and back.
        averaged: Whether the UNet holds the moving average of the weights.
    """

    unet: UNet2DModel
    first_stage: VQModel | AutoencoderKL
    averaged: bool


def convert_ldm(
    state: State,
    sample_size: int,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    ema: bool = True,
    scaling_factor: float = 1.0,
) -> LatentModel:
    """Convert an unconditional latent diffusion model (Rombach et al. 2022) from CompVis' ``model.ckpt``.

    Everything but the attention heads is read off the state dict. Heads are those of the ``unet_config``: LSUN-Churches
    ``num_heads=8``, LSUN-Bedrooms ``num_head_channels=32``; the legacy order of q, k and v is assumed, as in all their
    configs.

    Args:
        state: Of :func:`modiff.teachers.convert.checkpoints.read_checkpoint`.
        sample_size: Height and width of the latents: 32 for Churches, 64 for Bedrooms.
        num_heads: Attention heads, or
        num_head_channels: channels of a head; exactly one of both.
        ema: Use ``model_ema.*``, which the published figures do.
        scaling_factor: Of the latents, where the file holds no ``scale_factor``.

    Raises:
        CheckpointError: The state dict is of another kind or conditional, has no average, or keys are missing, left
            over or of another shape.
    """
    what = "a CompVis latent diffusion model"
    require(state, [f"{UNET}input_blocks.0.0.weight", f"{FIRST_STAGE}decoder.conv_in.weight"], what)
    known = (UNET, FIRST_STAGE, "model_ema.")
    other = [key for key in state if "." in key and not key.startswith(known)]
    if other:
        raise CheckpointError(
            f"{other[0]!r} and {len(other) - 1} more keys belong to neither UNet nor first stage: the model is "
            "conditional. Only unconditional ones are converted here; for others use diffusers' from_single_file."
        )
    weights = averaged_weights(state) if ema else strip(state, UNET)
    unet = convert_ldm_unet(weights, sample_size, num_heads, num_head_channels)
    scale = float(state["scale_factor"]) if "scale_factor" in state else scaling_factor
    first_stage = convert_first_stage(strip(state, FIRST_STAGE), sample_size, scale)
    return LatentModel(unet, first_stage, ema)


def averaged_weights(state: State) -> dict[str, Tensor]:
    """Return the moving average of the UNet's weights; CompVis stores it under the names without their dots.

    Raises:
        CheckpointError: The file holds no average, or not of every weight.
    """
    result, missing = {}, []
    for key in strip(state, UNET):
        average = "model_ema." + f"diffusion_model.{key}".replace(".", "")
        if average in state:
            result[key] = state[average]
        else:
            missing.append(average)
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights have no moving average, the first {', '.join(map(repr, missing[:10]))}. Set "
            "ema=False to use the plain weights."
        )
    return result


def convert_ldm_unet(
    state: State, sample_size: int, num_heads: int | None = None, num_head_channels: int | None = None
) -> UNet2DModel:
    """Convert the UNet alone; arguments as for :func:`convert_ldm`, ``state`` without ``model.diffusion_model.``."""
    what = "an unconditional CompVis UNet"
    require(state, ["time_embed.0.weight", "input_blocks.1.0.in_layers.2.weight", "out.2.weight"], what)
    extra = [key for key in state if "transformer_blocks" in key or key.startswith("label_emb")]
    if extra:
        raise CheckpointError(
            f"The UNet is conditional ({extra[0]!r}). Only unconditional ones are converted here; for others use "
            "diffusers' from_single_file."
        )
    layout = _layout(state)
    scale_shift = state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * layout["block_out_channels"][0]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attn_norm_num_groups": 32,  # by default diffusers omits the norm of the middle attention under scale_shift
        **layout,
    }
    if (num_heads is None) == (num_head_channels is None):
        raise CheckpointError(
            f"num_heads is {num_heads} and num_head_channels {num_head_channels}; the file does not tell them. Give "
            "exactly one, from the unet_config of the model (Churches: num_heads=8, Bedrooms: num_head_channels=32)."
        )
    width = num_heads or num_head_channels
    uneven = [c for c in layout["block_out_channels"] if c % width]
    if uneven:
        raise CheckpointError(
            f"{'num_heads' if num_heads else 'num_head_channels'} is {width}, which does not divide {uneven[0]} "
            "channels. Take it from the unet_config of the model."
        )
    if num_heads is not None:
        unet: UNet2DModel = FixedHeadsUNet2DModel(num_attention_heads=num_heads, **config)
    else:
        unet = UNet2DModel(attention_head_dim=num_head_channels, **config)
    fill(unet, ldm_sources(unet), state, what)
    return unet


def _layout(state: State) -> dict[str, Any]:
    """Read levels, widths, blocks and attention off the numbers of ``input_blocks``."""
    blocks = count(state, r"input_blocks\.(\d+)\.")

    layers = next((i - 1 for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in state), None)
    by_blocks = layers is None
    if layers is None:
        # resblock_updown: on the way down only its position tells a resampling block from another; on the way up it
        # stands behind one.
        up = next((i for i in range(count(state, r"output_blocks\.(\d+)\.")) if _upsamples(state, i)), None)
        layers = blocks - 1 if up is None else up
    level = layers + 1
    starts = range(1, blocks, level)
    if blocks % level:
        raise CheckpointError(
            f"{blocks} input_blocks do not fit {layers} blocks for each resolution: this is no unconditional CompVis "
            "UNet. Use the converter for this kind of checkpoint."
        )
    require(state, [f"input_blocks.{i}.0.in_layers.2.weight" for i in starts], "an unconditional CompVis UNet")
    attention = [f"input_blocks.{i}.1.norm.weight" in state for i in starts]
    kind = "resnet" if by_blocks else "conv"
    plain = ("DownBlock2D", "UpBlock2D") if not by_blocks else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "layers_per_block": layers,
        "block_out_channels": tuple(state[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in starts),
        "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(attention)),
        "downsample_type": kind,
        "upsample_type": kind,
    }


def _upsamples(state: State, i: int) -> bool:
    """Tell whether an output block ends with an upsampler, behind its residual block and its attention."""
    ends = [f"output_blocks.{i}.{place}.{leaf}" for place in (1, 2) for leaf in ("conv.weight", "in_layers.0.weight")]
    return any(key in state for key in ends)


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_sources(unet: UNet2DModel) -> dict[str, Source]:
    """Say where each tensor of a UNet comes from in CompVis' state dict (without the prefix)."""
    attentions = {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}
    return {key: _ldm_source(key, unet.config.layers_per_block, attentions) for key in unet.state_dict()}


def _ldm_source(key: str, layers: int, attentions: dict[str, nn.Module]) -> Source:
    module, _, kind = key.rpartition(".")
    if module in _ENDS:
        return Source(f"{_ENDS[module]}.{kind}")
    match = re.match(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)$", module)
    assert match is not None, key
    side, level, part, index, leaf = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if side == "mid_block":
        place = f"middle_block.{1 if part == 'attentions' else 2 * index}"
    else:
        down = side == "down_blocks"
        inner = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(part)
        if inner is None:  # an upsampler stands behind the attention
            inner = 2 if any(name.startswith(f"up_blocks.{level}.") for name in attentions) else 1
        index = layers if part in ("downsamplers", "upsamplers") else index
        place = f"{'input' if down else 'output'}_blocks.{level * (layers + 1) + index + down}.{inner}"
    if part == "attentions":
        return _attention_source(place, leaf, kind, attentions[module[: -len(leaf) - 1]])
    if leaf == "conv":
        return Source(f"{place}.{'op' if part == 'downsamplers' else 'conv'}.{kind}")
    return Source(f"{place}.{_RESNET[leaf]}.{kind}")


def _attention_source(place: str, leaf: str, kind: str, attention: Any) -> Source:
    """Projections are stored as one convolution, head by head: q, k and v of the first head, of the second, ..."""
    if leaf in ("group_norm", "to_out.0"):
        return Source(f"{place}.{'norm' if leaf == 'group_norm' else 'proj_out'}.{kind}")
    rows = torch.arange(3 * attention.inner_dim).view(attention.heads, 3, -1)
    return Source(f"{place}.qkv.{kind}", rows[:, ("to_q", "to_k", "to_v").index(leaf)].flatten())
