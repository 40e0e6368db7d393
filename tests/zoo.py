"""Pipelines of diffusers as data: one row for each class, with tiny random parts of our own for each family.

Prompts are given as embeddings, so that no text encoder is needed; images and masks are random numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pipelines
import torch
from pipelines import _conditional_unet, _embeddings, _unet, _vae

Parts = tuple[dict[str, Any], dict[str, Any]]
IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
MASK = (torch.arange(64).reshape(1, 1, 8, 8) % 2).float().repeat(2, 1, 1, 1)
TEXT = {
    "prompt_embeds": _embeddings(2, 5, 12),
    "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
    "pooled_prompt_embeds": _embeddings(2, 6),
    "negative_pooled_prompt_embeds": _embeddings(2, 6, seed=2),
    "prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
    "prompt_embeds_mask": torch.ones(2, 5, dtype=torch.int64),
    "negative_prompt_embeds_mask": torch.ones(2, 5, dtype=torch.int64),
    "text_ids": None,
    "negative_prompt": None,
    "guidance_scale": 3.0,
    "height": 8,
    "width": 8,
    "image": IMAGE,
    "control_image": IMAGE,
    "conditioning_image": IMAGE,
    "mask_image": MASK,
    "strength": 0.99,
    "use_resolution_binning": False,
    "num_frames": 2,
    "max_sequence_length": 5,
}
SAFETY = {"requires_safety_checker": False, "add_watermarker": False}


@dataclass(frozen=True)
class Row:
    """One class of pipelines.

    Args:
        module: Where it is, below ``diffusers.pipelines``.
        name: Of the class.
        parts: Its family.
        options: Of the family.
        call: Arguments of the call that differ from the family's.
        contexts: Names of the denoiser calls of a step, where the pipeline does not name them itself.
        config: Preset.
        refused: Text of the refusal, where modiff refuses the class; None: everything works.
    """

    module: str
    name: str
    parts: Callable[..., Parts]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    contexts: tuple[str, ...] | None = None
    config: str = "w8a8-modiff"
    refused: str | None = None

    def __str__(self) -> str:
        return self.name


def drawn(pipe: Any, call: dict[str, Any], steps: int = 3, seed: int = 0) -> torch.Tensor:
    """Images, frames or latents of one call."""
    generator = torch.Generator().manual_seed(seed)
    allowed = inspect.signature(type(pipe).__call__).parameters
    more = {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
    result = pipe(**{**{k: v for k, v in more.items() if k in allowed}, **call})
    first = next(v for v in result.to_tuple() if v is not None) if hasattr(result, "to_tuple") else result[0]
    return torch.as_tensor(first[0] if isinstance(first, list) else first)


def build(row: Row, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of its call."""
    torch.manual_seed(seed)
    cls = pipelines.pipeline_class(row.module, row.name)
    parts, given = row.parts(**row.options)
    wanted = inspect.signature(cls.__init__).parameters
    required = {n for n, p in wanted.items() if p.default is inspect.Parameter.empty and n != "self"}
    made = {name: part for name, part in {**SAFETY, **parts}.items() if name in wanted}
    pipe = cls(**{name: None for name in required}, **{}) if not made else cls(**{**dict.fromkeys(required), **made})
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    allowed = inspect.signature(cls.__call__).parameters
    call = {name: value for name, value in {**given, **row.call}.items() if name in allowed}
    return pipe, call


def unconditional(scheduler: str = "DDPMScheduler", **more: Any) -> Parts:
    """A UNet of pixels."""
    made = getattr(diffusers, scheduler)()
    return {"unet": _unet(**more), "scheduler": made, "vqvae": None}, {"batch_size": 2, "image": None}


def sd(scheduler: str = "DDIMScheduler", channels: int = 4, **more: Any) -> Parts:
    """Stable Diffusion 1 and 2."""
    parts: dict[str, Any] = {
        "vae": _vae(),
        "unet": _conditional_unet(in_channels=channels, **more),
        "scheduler": getattr(diffusers, scheduler)(steps_offset=1, clip_sample=False)
        if scheduler in ("DDIMScheduler",)
        else getattr(diffusers, scheduler)(),
        "low_res_scheduler": diffusers.DDPMScheduler(),
    }
    parts["controlnet"] = diffusers.ControlNetModel.from_unet(parts["unet"]) if channels == 4 else None
    return parts, dict(TEXT)


def sdxl(channels: int = 4, score: bool = False, **more: Any) -> Parts:
    """Stable Diffusion XL."""
    ids = 5 if score else 6
    unet = _conditional_unet(
        in_channels=channels,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=ids * 4 + 6,
        **more,
    )
    parts = {"vae": _vae(), "unet": unet, "scheduler": diffusers.EulerDiscreteScheduler()}
    parts["controlnet"] = diffusers.ControlNetModel.from_unet(unet) if channels == 4 else None
    return parts, dict(TEXT)


def of(builder: Callable[..., Any]) -> Callable[[], Parts]:
    """The parts of a pipeline that :mod:`pipelines` builds."""

    def parts() -> Parts:
        pipe, call = builder()
        return dict(pipe.components), {**TEXT, **call}

    return parts


def sd3(**more: Any) -> Parts:
    """Stable Diffusion 3."""
    parts, call = of(pipelines.stable_diffusion_3)()
    transformer = parts["transformer"]
    if more.get("control"):
        parts["controlnet"] = diffusers.SD3ControlNetModel.from_transformer(transformer, num_layers=1)
    return parts, call


def animate(xl: bool = False, channels: int = 4) -> Parts:
    """A UNet of images with motion modules."""
    parts, call = sdxl(channels=channels) if xl else sd(channels=channels)
    parts["motion_adapter"] = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    video = [[torch.rand(3, 8, 8)] * 2]
    one = {k: v[:1] for k, v in call.items() if isinstance(v, torch.Tensor) and k.endswith(("embeds",))}
    return parts, {**call, **one, "video": video, "conditioning_frames": [IMAGE[:1]] * 2, "image": IMAGE[:1]}


def deepfloyd(channels: int = 3, **more: Any) -> Parts:
    """DeepFloyd IF: pixels, learned variance."""
    unet = _conditional_unet(in_channels=channels, out_channels=6, encoder_hid_dim=12, **more)
    parts = {
        "unet": unet,
        "scheduler": diffusers.DDPMScheduler(variance_type="learned_range"),
        "image_noising_scheduler": diffusers.DDPMScheduler(),
    }
    return parts, {**TEXT, "original_image": IMAGE, "clean_caption": False}


def kandinsky(prior: bool = False, channels: int = 4) -> Parts:
    """Kandinsky 2.2: image embeddings in the place of a prompt."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=channels,
        out_channels=8,
        addition_embed_type="image" if channels != 8 else "image_hint",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=12,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=12,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        latent_channels=4,
        num_vq_embeddings=8,
        norm_type="spatial",
        vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    call = {"image_embeds": _embeddings(2, 12), "negative_image_embeds": _embeddings(2, 12, seed=2)}
    parts = {"unet": unet, "movq": movq, "scheduler": diffusers.DDIMScheduler(clip_sample=False)}
    return parts, {**TEXT, **call, "height": 64, "width": 64}


def auraflow() -> Parts:
    """AuraFlow."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, dict(TEXT)


def lumina2() -> Parts:
    """Lumina 2."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16),
        cap_feat_dim=12,
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, {**TEXT, "height": 16, "width": 16}


def ltx() -> Parts:
    """LTX video."""
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, {**TEXT, "height": 64, "width": 64, "num_frames": 9, "output_type": "latent"}


def wan() -> Parts:
    """Wan video: guidance in two calls, which the pipeline names."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)}
    return parts, {**TEXT, "height": 64, "width": 64, "num_frames": 5, "output_type": "latent"}


def cogvideox() -> Parts:
    """CogVideoX."""
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=12,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
    )
    parts = {"transformer": transformer, "scheduler": diffusers.CogVideoXDDIMScheduler()}
    return parts, {**TEXT, "height": 16, "width": 16, "num_frames": 9, "output_type": "latent"}


def hunyuandit() -> Parts:
    """HunyuanDiT: its attention pool multiplies by weights of its operators itself."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=4,
        hidden_size=24,
        activation_fn="gelu-approximate",
        in_channels=4,
        text_len=5,
        text_len_t5=5,
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.DDPMScheduler()}
    second = {f"{name}_2": value for name, value in TEXT.items() if name.endswith(("embeds", "attention_mask"))}
    second |= {"prompt_embeds_2": _embeddings(2, 5, 16), "negative_prompt_embeds_2": _embeddings(2, 5, 16, seed=2)}
    return parts, {**TEXT, **second, "height": 16, "width": 16}


def cogview4() -> Parts:
    """CogView 4: guidance in two calls, which the pipeline names."""
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": scheduler}
    return parts, {**TEXT, "height": 16, "width": 16}


def chroma() -> Parts:
    """Chroma: guidance in two calls."""
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, dict(TEXT)


def qwen() -> Parts:
    """Qwen-Image: guidance in two calls, which the pipeline names."""
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(8, 4, 4),
    )
    parts = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, {**TEXT, "height": 32, "width": 32, "true_cfg_scale": 2.0, "output_type": "latent"}


def bria() -> Parts:
    """Bria, which asks for the class of its scheduler."""
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=None,
        axes_dims_rope=(0, 4, 4),
    )
    parts = {"transformer": transformer, "vae": _vae(), "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    return parts, {**TEXT, "height": 16, "width": 16}
