"""DDPM UNets in the naming of the DDIM repository (CIFAR-10, LSUN, CelebA-HQ) as diffusers modules."""

from __future__ import annotations

import re

from diffusers import UNet2DModel
from torch import nn

from modiff.teachers.convert.checkpoints import Source, State, count, fill, require

# diffusers' names of modules on the left, those of Ho et al. (and of CompVis' first stages) on the right.
_LEAVES = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_PLACES = {
    "conv_norm_out": "norm_out",
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
_PARTS = {"resnets": "block", "attentions": "attn"}


def ho_name(name: str, levels: int) -> str:
    """Return the name that Ho et al. give a parameter which diffusers calls ``name``.

    Args:
        name: Such as ``up_blocks.0.attentions.1.to_q.weight``.
        levels: Number of resolutions; diffusers counts the way up from the coarsest, the original from the finest.

    >>> ho_name("up_blocks.0.attentions.1.to_q.weight", 4)
    'up.3.attn.1.q.weight'
    """
    for ours, theirs in _PLACES.items():
        name = re.sub(rf"^{re.escape(ours)}\.", f"{theirs}.", name)
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(.*)", name):
        way, level, rest = match[1], int(match[2]), match[3]
        rest = re.sub(r"^(down|up)samplers\.0\.", r"\1sample.", rest)
        rest = re.sub(r"^(resnets|attentions)\.", lambda m: f"{_PARTS[m[1]]}.", rest)
        name = f"{way}.{level if way == 'down' else levels - 1 - level}.{rest}"
    for ours, theirs in _LEAVES.items():
        name = re.sub(rf"\.{re.escape(ours)}\.(weight|bias)$", rf".{theirs}.\1", name)
    return name


def ddpm_sources(unet: nn.Module) -> dict[str, Source]:
    """Say where each tensor of a UNet comes from in the DDIM repository's state dict."""
    levels = len(unet.down_blocks)
    return {name: Source(ho_name(name, levels)) for name in unet.state_dict()}


def convert_ddpm(state: State, sample_size: int) -> UNet2DModel:
    """Convert a DDPM UNet (Ho et al. 2020) from the state dict of the DDIM repository.

    Channels, levels, blocks and the levels with attention are read off the state dict.

    Args:
        state: Of :func:`modiff.teachers.convert.checkpoints.read_checkpoint`.
        sample_size: Height and width of the images in pixels: 32 for CIFAR-10, 256 for LSUN.

    Returns:
        The UNet in evaluation mode; predicts the noise.

    Raises:
        CheckpointError: The state dict is of another kind, or keys are missing, left over or of another shape.
    """
    what = "a DDPM UNet in the naming of the DDIM repository"
    require(state, ["conv_in.weight", "conv_out.weight", "temb.dense.0.weight", "down.0.block.0.conv1.weight"], what)
    levels = count(state, r"down\.(\d+)\.")
    require(state, [f"down.{i}.block.0.conv1.weight" for i in range(levels)], what)
    attention = [any(key.startswith(f"down.{i}.attn.") for key in state) for i in range(levels)]
    unet = UNet2DModel(
        sample_size=sample_size,
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=state["conv_out.weight"].shape[0],
        layers_per_block=count(state, r"down\.0\.block\.(\d+)\."),
        block_out_channels=tuple(state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        attention_head_dim=None,  # one head over all channels
        norm_eps=1e-6,
        downsample_padding=0,  # the original pads right and below only; so does diffusers for padding 0
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    fill(unet, ddpm_sources(unet), state, what)
    return unet
