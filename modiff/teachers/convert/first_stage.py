"""First stages (autoencoders) of CompVis' latent diffusion models as diffusers modules."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, VQModel

from modiff.teachers.convert.checkpoints import Source, State, count, fill, require
from modiff.teachers.convert.ddpm import ho_name


def convert_first_stage(state: State, sample_size: int, scaling_factor: float = 1.0) -> VQModel | AutoencoderKL:
    """Convert the autoencoder of a latent diffusion model: a VQModel where there is a codebook, else an AutoencoderKL.

    Args:
        state: Without the prefix ``first_stage_model.``; the discriminator (``loss.*``) is left out.
        sample_size: Height and width of the latents.
        scaling_factor: Latents are multiplied by it before the UNet sees them.

    Raises:
        CheckpointError: The state dict is of another kind, or keys are missing, left over or of another shape.
    """
    what = "a CompVis first stage"
    state = {key: value for key, value in state.items() if not key.startswith("loss.")}
    needed = ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
    require(state, [*needed, "encoder.conv_in.weight", "post_quant_conv.weight"], what)
    levels = count(state, r"encoder\.down\.(\d+)\.")
    require(state, [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)], what)

    def attends(way: str, i: int) -> bool:
        return any(key.startswith(f"{way}.{i}.attn.") for key in state)

    down = ["AttnDownEncoderBlock2D" if attends("encoder.down", i) else "DownEncoderBlock2D" for i in range(levels)]
    up = ["AttnUpDecoderBlock2D" if attends("decoder.up", i) else "UpDecoderBlock2D" for i in reversed(range(levels))]
    latent, embedding = state["decoder.conv_in.weight"].shape[1], state["post_quant_conv.weight"].shape[1]
    config: dict[str, Any] = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        "layers_per_block": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": latent,
        "sample_size": sample_size * 2 ** (levels - 1),
        "scaling_factor": scaling_factor,
    }
    if "quantize.embedding.weight" in state:
        codes = state["quantize.embedding.weight"].shape[0]
        model: VQModel | AutoencoderKL = VQModel(num_vq_embeddings=codes, vq_embed_dim=embedding, **config)
    else:
        model = AutoencoderKL(**config)
    sources = {}
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        sources[key] = Source(f"{part}.{ho_name(rest, levels)}" if part in ("encoder", "decoder") else key)
    fill(model, sources, state, what)
    return model
