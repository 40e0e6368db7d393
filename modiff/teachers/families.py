"""How each class of denoiser is called: arguments of its forward, rows of guidance, and the latents' way to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Arguments = Callable[[Tensor, Tensor, Mapping[str, Tensor], Any], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One class of denoiser.

    Args:
        denoiser: Class names in its ``config.json``.
        arguments: ``arguments(x, t, conditioning, config)`` are the keyword arguments of its forward, the noisy input
            first; ``t`` is a scalar tensor, ``config`` the denoiser's.
        condition: What it is told about the image: nothing, a class, or a text.
        latent: Whether its output has to be decoded.
        guided: Whether guidance evaluates it with and without the condition; not where guidance is an input.
        encodings: Names of what the pipeline's ``encode_prompt`` returns, in order; ``-`` marks those of the empty
            prompt, an empty name what is not used.
        embeddings: ``embeddings(config)`` are the shapes of one sample's embeddings (an empty shape: a mask).
        latent_channels: Channels of x_t; None: the config's ``in_channels``.
        schedule: Scheduler config of a tiny random model.
    """

    denoiser: tuple[str, ...]
    arguments: Arguments
    condition: Literal["label", "text"] | None = None
    latent: bool = True
    guided: bool = False
    encodings: tuple[str, ...] = ()
    embeddings: Callable[[Any], dict[str, tuple[int, ...]]] | None = None
    latent_channels: Callable[[Any], int] | None = None
    schedule: tuple[tuple[str, Any], ...] = ()

    def channels(self, config: Any) -> int:
        """Return the channels of x_t."""
        return int(self.latent_channels(config) if self.latent_channels else config.in_channels)

    def output(self, output: Any, x: Tensor) -> Tensor:
        """Return the prediction in the shape of ``x`` ``[B, C, H, W]``: unpacked, without a learned variance."""
        tensor = first_tensor(output)
        if tensor.ndim == 3:
            tensor = unpack(tensor, x.shape[2], x.shape[3])
        return tensor[:, : x.shape[1]]


def first_tensor(output: Any) -> Tensor:
    """Return the tensor in a denoiser's answer: itself, ``.sample``, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    return output.sample if hasattr(output, "sample") else output[0]


def pack(x: Tensor) -> Tensor:
    """Turn patches of 2x2 into tokens.

    >>> pack(torch.zeros(1, 16, 8, 4)).shape
    torch.Size([1, 8, 64])
    """
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`pack`.

    >>> x = torch.rand(1, 16, 8, 4)
    >>> torch.equal(unpack(pack(x), 8, 4), x)
    True
    """
    b, _, c = tokens.shape
    return (
        tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)
    )


def _rows(t: Tensor, x: Tensor) -> Tensor:
    return t.expand(len(x))


def _unet(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    return {"sample": x, "timestep": t}


def _dit(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": _rows(t, x), "class_labels": c["class_labels"]}


def _sd(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    return {"sample": x, "timestep": t, "encoder_hidden_states": c["encoder_hidden_states"]}


def _sdxl(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    added = {"text_embeds": c["text_embeds"], "time_ids": c["time_ids"]}
    return {**_sd(x, t, c, config), "added_cond_kwargs": added}


def _pixart(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    added = {"resolution": None, "aspect_ratio": None}  # Sigma has neither; its class asks for them all the same
    return {**_sana(x, t, c, config), "added_cond_kwargs": added}


def _sana(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": c["encoder_hidden_states"],
        "encoder_attention_mask": c["encoder_attention_mask"],
        "timestep": _rows(t, x) * getattr(config, "timestep_scale", 1),
    }


def _sd3(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    return {
        "hidden_states": x,
        "encoder_hidden_states": c["encoder_hidden_states"],
        "pooled_projections": c["pooled_projections"],
        "timestep": _rows(t, x),
    }


def _flux(x: Tensor, t: Tensor, c: Mapping[str, Tensor], config: Any) -> dict[str, Any]:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(height).float(), torch.arange(width).float())
    return {
        "hidden_states": pack(x),
        "timestep": _rows(t, x) / 1000,
        "guidance": c.get("guidance"),
        "pooled_projections": c["pooled_projections"],
        "encoder_hidden_states": c["encoder_hidden_states"],
        "txt_ids": x.new_zeros(c["encoder_hidden_states"].shape[1], 3),
        "img_ids": places.to(x),
    }


TEXT = 8
"""Tokens of a tiny model's random text."""

_CAPTION_AND_MASK = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "-encoder_hidden_states",
    "-encoder_attention_mask",
)


def _caption_and_mask(config: Any) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (TEXT, config.caption_channels), "encoder_attention_mask": ()}


def _text_and_pooled(config: Any) -> dict[str, tuple[int, ...]]:
    return {
        "encoder_hidden_states": (TEXT, config.joint_attention_dim),
        "pooled_projections": (config.pooled_projection_dim,),
    }


_LINEAR = (("_class_name", "DDPMScheduler"), ("beta_start", 1e-4), ("beta_end", 0.02), ("clip_sample", False))
_LDM = (
    ("_class_name", "DDIMScheduler"),
    ("beta_start", 0.0015),
    ("beta_end", 0.0195),
    ("beta_schedule", "scaled_linear"),
    ("clip_sample", False),
)
_STABLE = (
    ("_class_name", "PNDMScheduler"),
    ("beta_start", 0.00085),
    ("beta_end", 0.012),
    ("beta_schedule", "scaled_linear"),
    ("set_alpha_to_one", False),
    ("steps_offset", 1),
)
_FLOW = (("_class_name", "FlowMatchEulerDiscreteScheduler"), ("shift", 3.0))
_SANA = (
    ("_class_name", "DPMSolverMultistepScheduler"),
    ("prediction_type", "flow_prediction"),
    ("use_flow_sigmas", True),
    ("flow_shift", 3.0),
)

FAMILIES: dict[str, Family] = {
    "pixel": Family(
        ("UNet2DModel", "FixedHeadsUNet2DModel", "PatchedUNet2DModel"), _unet, latent=False, schedule=_LINEAR
    ),
    "latent": Family(("UNet2DModel", "FixedHeadsUNet2DModel", "PatchedUNet2DModel"), _unet, schedule=_LDM),
    "dit": Family(
        ("DiTTransformer2DModel", "Transformer2DModel", "OriginalDiTTransformer2DModel"),
        _dit,
        condition="label",
        guided=True,
        schedule=_LINEAR,
    ),
    "sd": Family(
        ("UNet2DConditionModel",),
        _sd,
        condition="text",
        guided=True,
        encodings=("encoder_hidden_states", "-encoder_hidden_states"),
        embeddings=lambda config: {"encoder_hidden_states": (TEXT, config.cross_attention_dim)},
        schedule=_STABLE,
    ),
    "sdxl": Family(
        ("UNet2DConditionModel",),
        _sdxl,
        condition="text",
        guided=True,
        encodings=("encoder_hidden_states", "-encoder_hidden_states", "text_embeds", "-text_embeds"),
        embeddings=lambda config: {
            "encoder_hidden_states": (TEXT, config.cross_attention_dim),
            "text_embeds": (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,),
        },
        schedule=_STABLE,
    ),
    "pixart": Family(
        ("PixArtTransformer2DModel", "Transformer2DModel"),
        _pixart,
        condition="text",
        guided=True,
        encodings=_CAPTION_AND_MASK,
        embeddings=_caption_and_mask,
        schedule=_LINEAR,
    ),
    "sd3": Family(
        ("SD3Transformer2DModel",),
        _sd3,
        condition="text",
        guided=True,
        encodings=("encoder_hidden_states", "-encoder_hidden_states", "pooled_projections", "-pooled_projections"),
        embeddings=_text_and_pooled,
        schedule=_FLOW,
    ),
    "flux": Family(
        ("FluxTransformer2DModel",),
        _flux,
        condition="text",
        encodings=("encoder_hidden_states", "pooled_projections", ""),
        embeddings=_text_and_pooled,
        latent_channels=lambda config: config.in_channels // 4,
        schedule=(*_FLOW[:1], ("shift", 1.0)),
    ),
    "sana": Family(
        ("SanaTransformer2DModel",),
        _sana,
        condition="text",
        guided=True,
        encodings=_CAPTION_AND_MASK,
        embeddings=_caption_and_mask,
        schedule=_SANA,
    ),
}
"""Every kind of denoiser that ``modiff evaluate`` can sample; others by :func:`modiff.quantize_pipeline`."""
