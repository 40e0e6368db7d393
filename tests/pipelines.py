"""Tiny random pipelines of diffusers' classes, without text encoders: prompts are given as embeddings."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from contextlib import contextmanager

import diffusers
import torch
from diffusers import loaders

EVALUATIONS = {"stable_diffusion": 5}
"""Denoiser calls of four steps where they are not four: PNDM evaluates its second time step twice."""


class _Standin(types.ModuleType):
    """Any name as an empty class: pipelines import their text encoders' classes, of which nothing here is used."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


@contextmanager
def _transformers():
    """Let pipelines be imported where transformers is not installed."""
    if importlib.util.find_spec("transformers") is not None:
        yield
        return
    names = ("transformers", "tokenizers")
    added = {}
    sys.modules.update({name: _Standin(name) for name in names})
    try:
        for file in ("single_file", "ip_adapter", "lora_pipeline", "textual_inversion"):
            module = importlib.import_module(f"diffusers.loaders.{file}")
            added.update({k: v for k, v in vars(module).items() if k.endswith("Mixin") and k not in vars(loaders)})
        vars(loaders).update(added)
        yield
    finally:
        for name in names:
            del sys.modules[name]
        for name in added:
            vars(loaders).pop(name)


def pipeline_class(module, name):
    with _transformers():
        return getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)


BLOCKS = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def _vae(channels=4):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=channels, sample_size=8, shift_factor=0.0
    )


def _unet(**more):
    return diffusers.UNet2DModel(
        **BLOCKS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **more,
    )


def _conditional_unet(**more):
    return diffusers.UNet2DConditionModel(
        **BLOCKS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        **more,
    )


def ddpm():
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(_unet(), DDPMScheduler(100)), {"batch_size": 2}


def ddim():
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(_unet(), DDIMScheduler(100)), {"batch_size": 2}


def ldm():
    cls = pipeline_class("deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond", "LDMPipeline")
    vqvae = diffusers.VQModel(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, num_vq_embeddings=8, sample_size=8
    )
    return cls(vqvae, _unet(), diffusers.DDIMScheduler(100)), {"batch_size": 2}


def _embeddings(batch, *shape, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion(batch=2, guidance=3.0):
    cls = pipeline_class("stable_diffusion.pipeline_stable_diffusion", "StableDiffusionPipeline")
    scheduler = diffusers.PNDMScheduler(100, steps_offset=1, skip_prk_steps=True)
    pipe = cls(_vae(), None, None, _conditional_unet(), scheduler, None, None, requires_safety_checker=False)
    return pipe, {
        "prompt_embeds": _embeddings(batch, 5, 12),
        "negative_prompt_embeds": _embeddings(batch, 5, 12, seed=2),
        "guidance_scale": guidance,
        "height": 8,
        "width": 8,
    }


def stable_diffusion_xl():
    cls = pipeline_class("stable_diffusion_xl.pipeline_stable_diffusion_xl", "StableDiffusionXLPipeline")
    unet = _conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 6
    )
    # The pipeline asks an encoder for the width of its pooled embeddings.
    pipe = cls(_vae(), None, None, None, None, unet, diffusers.EulerDiscreteScheduler(100))
    return pipe, {
        "prompt_embeds": _embeddings(2, 5, 12),
        "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
        "pooled_prompt_embeds": _embeddings(2, 6),
        "negative_pooled_prompt_embeds": _embeddings(2, 6, seed=2),
        "height": 8,
        "width": 8,
    }


def dit():
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=4,
        num_embeds_ada_norm=1000,
    )
    return DiTPipeline(transformer, _vae(), diffusers.DDIMScheduler(100)), {"class_labels": [1, 2]}


def pixart_sigma():
    cls = pipeline_class("pixart_alpha.pipeline_pixart_sigma", "PixArtSigmaPipeline")
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=4,
        use_additional_conditions=False,
    )
    pipe = cls(None, None, _vae(), transformer, diffusers.DPMSolverMultistepScheduler(100))
    return pipe, {
        "prompt_embeds": _embeddings(2, 5, 12),
        "prompt_attention_mask": torch.ones(2, 5),
        "negative_prompt": None,
        "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
        "negative_prompt_attention_mask": torch.ones(2, 5),
        "height": 8,
        "width": 8,
        "use_resolution_binning": False,
    }


def stable_diffusion_3():
    cls = pipeline_class("stable_diffusion_3.pipeline_stable_diffusion_3", "StableDiffusion3Pipeline")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=8,
        pooled_projection_dim=6,
        out_channels=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = cls(transformer, scheduler, _vae(), None, None, None, None, None, None)
    return pipe, {
        "prompt_embeds": _embeddings(2, 5, 12),
        "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
        "pooled_prompt_embeds": _embeddings(2, 6),
        "negative_pooled_prompt_embeds": _embeddings(2, 6, seed=2),
        "height": 8,
        "width": 8,
    }


def flux(guidance=1.0):
    cls = pipeline_class("flux.pipeline_flux", "FluxPipeline")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
    )
    pipe = cls(diffusers.FlowMatchEulerDiscreteScheduler(), _vae(), None, None, None, None, transformer)
    return pipe, {
        "prompt_embeds": _embeddings(2, 5, 12),
        "pooled_prompt_embeds": _embeddings(2, 6),
        "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
        "negative_pooled_prompt_embeds": _embeddings(2, 6, seed=2),
        "true_cfg_scale": guidance,
        "height": 8,
        "width": 8,
    }


def sana():
    cls = pipeline_class("sana.pipeline_sana", "SanaPipeline")
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
        patch_size=1,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    pipe = cls(None, None, vae, transformer, diffusers.DPMSolverMultistepScheduler(100))
    return pipe, {
        "prompt_embeds": _embeddings(2, 5, 12),
        "prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "negative_prompt": None,
        "negative_prompt_embeds": _embeddings(2, 5, 12, seed=2),
        "negative_prompt_attention_mask": torch.ones(2, 5, dtype=torch.int64),
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
    }


BUILDERS = (ddpm, ddim, ldm, stable_diffusion, stable_diffusion_xl, dit, pixart_sigma, stable_diffusion_3, flux, sana)


def build(builder, seed=0, **options):
    """A pipeline and the arguments of its call."""
    torch.manual_seed(seed)
    pipe, arguments = builder(**options)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipe, arguments


def draw(pipe, arguments, steps=4, seed=0, **more):
    """Images (or latents) of one call, as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    result = pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="np", **more)
    return torch.as_tensor(result.images)
