"""What a teacher of the zoo draws is what its diffusers pipeline draws, on tiny random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from pipelines import build, draw
from torch import Tensor

import modiff
from modiff.errors import ConfigError
from modiff.lit.modules.student import LitStudent, to_unit_range
from modiff.teachers.families import FAMILIES, pack
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.tiny import tiny_model
from modiff.teachers.zoo import ZOO, TeacherSpec, load_teacher

INDICES = torch.arange(2)
STEPS = 3


def family(name: str) -> Any:
    return FAMILIES[ZOO[name].family.split("-")[0]]


TEXT_TO_IMAGE = [name for name in ZOO if family(name).condition == "text"]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="diffusers' text-to-image pipelines need transformers"
)


def save_parts(folder: Path, name: str) -> Path:
    """The parts of a tiny pipeline, each saved as diffusers saves it."""
    entry = ZOO[name]
    denoiser, decoder = tiny_model(entry.family)
    denoiser.save_pretrained(folder / ("unet" if "UNet" in type(denoiser).__name__ else "transformer"))
    if decoder is not None:
        decoder.save_pretrained(folder / ("vqvae" if entry.pipeline == "LDMPipeline" else "vae"))
    config = dict(family(name).schedule)
    getattr(diffusers, config.pop("_class_name"))(**config).save_pretrained(folder / "scheduler")
    return folder


def module_of(name: str, folder: Path, conditions: Any = None, **options: Any) -> LitStudent:
    """A student with weights and activations in full precision but modulated operators, and its teacher."""
    quiet = modiff.QuantConfig(modulation=modiff.Modulation())
    size = {"flux-schnell": 16, "flux-dev": 16, "sana": 32}.get(name)  # FLUX has none of its own, SanaPipeline a least
    spec = TeacherSpec(name, str(folder), image_size=size)
    module = LitStudent(spec, config=quiet, steps=STEPS, **options)
    module.prepare(conditions=conditions)
    module.loaded.encode = None  # random embeddings in place of the text encoders, which a tiny pipeline lacks
    return module


@pytest.fixture
def no_text_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modiff.teachers.loading.make_encoder", lambda *_: None)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "mnist"])
def test_full_precision_student_draws_the_teachers_images_twice(name, tmp_path, no_text_encoders) -> None:
    module = module_of(name, save_parts(tmp_path, name))
    teacher, _ = module.draw("teacher", INDICES)
    for _ in range(2):
        with modiff.trajectory(module.student) as run:
            assert torch.equal(module.draw("student", INDICES)[0], teacher)
        assert run.quantized == 0
    assert teacher.shape[1:] == module.image_shape
    assert not torch.equal(teacher[0], teacher[1])
    assert modiff.restore(module.student) is not None
    assert torch.equal(module.draw("student", INDICES)[0], teacher)


SAVED = {
    "ddpm-cifar10": pipelines.ddpm,
    "ldm-celebahq": pipelines.ldm,
    "sd-v1-4": pipelines.stable_diffusion,
    "sdxl": pipelines.stable_diffusion_xl,
    "dit-xl-2-256": pipelines.dit,
    "pixart-sigma": pipelines.pixart_sigma,
    "sd3": pipelines.stable_diffusion_3,
    "flux-schnell": pipelines.flux,
    "sana": pipelines.sana,
}


def test_every_pipeline_class_of_the_zoo_is_saved_below() -> None:
    assert {type(build(builder)[0]).__name__ for builder in SAVED.values()} == {e.pipeline for e in ZOO.values()}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_pipeline_is_loaded_quantized_sampled_twice_and_restored(name, tmp_path, no_text_encoders) -> None:
    """As diffusers' ``save_pretrained`` writes it; the zoo's modules then draw in another pipe of the class."""
    saved, arguments = build(SAVED[name])
    expected = draw(saved, arguments)
    saved.save_pretrained(tmp_path)
    module = module_of(name, tmp_path)
    teacher, _ = module.draw("teacher", INDICES)
    for _ in range(2):
        with modiff.trajectory(module.student):
            assert torch.equal(module.draw("student", INDICES)[0], teacher)

    pipe, _ = build(SAVED[name], seed=1)
    part = next(part for part in ("unet", "transformer") if part in pipe.components)
    decoder = next((part for part in ("vae", "vqvae") if part in pipe.components), None)
    pipe.register_modules(**{part: module.loaded.denoiser}, **({decoder: module.decoder} if decoder else {}))
    assert torch.equal(draw(pipe, arguments), expected)
    modiff.quantize_pipeline(pipe, modiff.QuantConfig(modulation=modiff.Modulation()))
    assert torch.equal(draw(pipe, arguments), expected)
    modiff.restore_pipeline(pipe)
    modiff.quantize_pipeline(pipe, "w8a6-modiff-paper")
    images = draw(pipe, arguments)
    assert torch.equal(draw(pipe, arguments), images)
    assert not torch.equal(images, expected)
    modiff.restore_pipeline(pipe)
    assert torch.equal(draw(pipe, arguments), expected)
    assert torch.equal(module.draw("teacher", INDICES)[0], teacher)


def images_of(pipeline: Any, module: LitStudent, call: Callable[[Any], Any]) -> Tensor:
    """Images of a diffusers pipeline ``[B, C, H, W]`` in [0, 1], with the sampler of the module."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler(module.scheduler_name, module.loaded.scheduler_config)
    return torch.from_numpy(call(pipeline).images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["ddpm-cifar10", "ldm-church", "ldm-bedroom", "dit-xl-2-256"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_the_pipeline(name, guidance, tmp_path, monkeypatch) -> None:
    conditional = name.startswith("dit")
    if guidance > 1 and not conditional:
        pytest.skip("unconditional")
    labels = (lambda indices: [7 - i for i in indices]) if conditional else None
    module = module_of(name, save_parts(tmp_path, name), labels, scheduler="ddim", guidance=guidance)
    images = to_unit_range(module.draw("teacher", INDICES)[0])
    noise = module.noise(INDICES)
    for where in (
        "deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
        "dit.pipeline_dit",
        "ddim.pipeline_ddim",
    ):
        monkeypatch.setattr(f"diffusers.pipelines.{where}.randn_tensor", lambda *_, **__: noise.clone())
    scheduler = make_scheduler("ddim", module.loaded.scheduler_config)
    denoiser, decoder = module.loaded.denoiser, module.loaded.decoder
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    if name.startswith("ddpm"):
        found = images_of(diffusers.DDIMPipeline(denoiser, scheduler), module, lambda p: p(2, **options))
    elif conditional:
        pipeline = diffusers.DiTPipeline(denoiser, decoder, scheduler)
        found = images_of(pipeline, module, lambda p: p([7, 6], guidance_scale=guidance, **options))
    else:
        found = images_of(diffusers.LDMPipeline(decoder, denoiser, scheduler), module, lambda p: p(2, **options))
    torch.testing.assert_close(images, found, atol=2e-6, rtol=0)  # rounding: rows are batched in another order


NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "text_embeds": "pooled_prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
}


@needs_transformers
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_images_are_those_of_the_text_pipeline(name, tmp_path) -> None:
    module = module_of(name, save_parts(tmp_path, name))
    if name == "sdxl-turbo":  # its noise is seeded by index here, and by a generator there
        module.scheduler_name = "euler"
    images = to_unit_range(module.draw("teacher", INDICES)[0])
    embeddings = {}
    for key, value in module.conditioning(INDICES).items():
        if key in NAMES:
            embeddings[NAMES[key]] = value[:2]
            if len(value) > 2:
                embeddings[f"negative_{NAMES[key]}"] = value[2:]
    cls = getattr(diffusers, ZOO[name].pipeline)
    arguments: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if name != "sana" and "sigma" not in name and name != "sd-v1-4":
        arguments.update(text_encoder_2=None, tokenizer_2=None)
    if name == "sd3":
        arguments.update(text_encoder_3=None, tokenizer_3=None)
    if name == "sd-v1-4":
        arguments.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    part = "unet" if "UNet" in type(module.teacher).__name__ else "transformer"
    scheduler = make_scheduler(module.scheduler_name, module.loaded.scheduler_config)
    pipeline = cls(**arguments, **{part: module.teacher}, vae=module.decoder, scheduler=scheduler)
    noise = module.noise(INDICES)
    options: dict[str, Any] = {"guidance_scale": module.guidance, "num_inference_steps": STEPS, "output_type": "np"}
    size = module.image_shape[1]
    options.update(height=size, width=size, latents=pack(noise) if name.startswith("flux") else noise, **embeddings)
    if name in ("pixart-sigma", "sana"):
        options.update(use_resolution_binning=False, negative_prompt=None)
    if name.startswith("flux"):  # the pipeline makes the noise levels itself
        config = {key: value for key, value in module.loaded.scheduler_config.items() if key != "image_seq_len"}
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        pipeline.set_progress_bar_config(disable=True)
        found = torch.from_numpy(pipeline(**options).images).permute(0, 3, 1, 2)
    else:
        found = images_of(pipeline, module, lambda p: p(**options))
    torch.testing.assert_close(images, found, atol=5e-6, rtol=0)


def test_text_to_image_without_transformers_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'modiff\[text\]'"):
        load_teacher(TeacherSpec("sd-v1-4", str(save_parts(tmp_path, "sd-v1-4"))))


@pytest.mark.parametrize("name", ["sd-v1-4", "sdxl", "pixart-sigma", "sana"])
def test_keys_and_values_of_the_prompt_are_constant_in_a_teacher_of_the_zoo(name) -> None:
    module = LitStudent(TeacherSpec(name, tiny=True), preset="w8a4-modiff-paper", steps=STEPS)
    module.configure_model()
    args, kwargs = module.inputs(module.noise(INDICES), INDICES)
    before = modiff.cost(module.student, *args, evaluations=STEPS, **kwargs)
    with modiff.trajectory(module.student):
        module.draw("student", INDICES)
    keys = {n for n, _ in module.student.named_modules() if n.endswith((".attn2.to_k", ".attn2.to_v"))}
    assert keys <= {row.name for row in modiff.describe(module.student) if row.constant}
    after = modiff.cost(module.student, *args, evaluations=STEPS, **kwargs)
    rows = {row.name: row for row in before.operators}
    for row in after.operators:
        if row.name in keys:  # computed in the warm-up of 32 bits, in none of the two evaluations of 4 bits after it
            assert row.constant
            assert row.bops == pytest.approx(rows[row.name].bops * 32 / (32 + (STEPS - 1) * 4))
    assert after.gbops_per_evaluation < before.gbops_per_evaluation
