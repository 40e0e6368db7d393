"""Original DiT checkpoints (Peebles & Xie 2023) as diffusers modules."""

from __future__ import annotations

import math
import re

import torch
from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps

from modiff.errors import CheckpointError
from modiff.teachers.convert.checkpoints import Source, State, count, fill, require

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads of the published sizes S, B, L and XL, by their width."""


class OriginalDiTTransformer2DModel(DiTTransformer2DModel):
    """A ``DiTTransformer2DModel`` that computes what the original computes.

    diffusers spaces the frequencies of the time embedding by 1/127, the original by 1/128, which shifts their phase by
    radians at high noise; and its second norm adds another epsilon. Takes the arguments below.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        sample_size: int = 32,
        patch_size: int = 2,
        num_embeds_ada_norm: int = 1000,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            num_embeds_ada_norm=num_embeds_ada_norm,
            norm_eps=norm_eps,
        )
        for module in self.modules():
            if isinstance(module, Timesteps):
                module.downscale_freq_shift = 0


def convert_dit(state: State, num_heads: int | None = None) -> OriginalDiTTransformer2DModel:
    """Convert a class-conditional DiT from the original's state dict; the last class is the empty one of the guidance.

    Args:
        state: Of :func:`modiff.teachers.convert.checkpoints.read_checkpoint`.
        num_heads: Attention heads; None: of the published size with this width.

    Returns:
        The transformer in evaluation mode. It predicts noise and variance (twice the channels of its input) if the
        original does.

    Raises:
        CheckpointError: The state dict is of another kind, its position embedding is not the fixed one, the number of
            heads is unknown, or keys are missing, left over or of another shape.
    """
    what = "an original DiT"
    needed = ["x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight"]
    require(state, needed, what)
    width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    heads = num_heads or HEADS.get(width)
    if heads is None or width % heads:
        raise CheckpointError(
            f"num_heads is {num_heads}, and the file does not tell it for {width} channels. Give num_heads, a divisor "
            "of them; the published sizes have " + ", ".join(f"{h} for {w}" for w, h in HEADS.items()) + "."
        )
    model = OriginalDiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=state["final_layer.linear.weight"].shape[0] // patch**2,
        num_layers=count(state, r"blocks\.(\d+)\."),
        sample_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        num_embeds_ada_norm=state["y_embedder.embedding_table.weight"].shape[0] - 1,
    )
    fixed = model.pos_embed.pos_embed
    if state["pos_embed"].shape != fixed.shape or not torch.allclose(state["pos_embed"].float(), fixed, atol=1e-4):
        raise CheckpointError(
            "pos_embed is not the fixed sine-cosine embedding of the original, which is all that diffusers' class "
            "holds. Use a checkpoint with the original's position embedding."
        )
    state = {key: value for key, value in state.items() if key != "pos_embed"}
    fill(model, dit_sources(model), state, what)
    return model


_PLACES = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


def dit_sources(model: DiTTransformer2DModel) -> dict[str, Source]:
    """Say where each tensor of a DiT comes from; diffusers has one copy of the embedders per block."""
    width = model.inner_dim
    sources = {}
    for key in model.state_dict():
        module, _, kind = key.rpartition(".")
        match = re.match(r"transformer_blocks\.(\d+)\.(.+)$", module)
        if match is None:
            sources[key] = Source(f"{_PLACES[module]}.{kind}")
        elif match[2].startswith("norm1.emb."):
            sources[key] = Source(f"{_EMBEDDERS[match[2][len('norm1.emb.') :]]}.{kind}")
        elif match[2] in _BLOCK:
            sources[key] = Source(f"blocks.{match[1]}.{_BLOCK[match[2]]}.{kind}")
        else:
            third = ("attn1.to_q", "attn1.to_k", "attn1.to_v").index(match[2])
            sources[key] = Source(f"blocks.{match[1]}.attn.qkv.{kind}", torch.arange(width) + third * width)
    return sources
