"""Teachers from pipeline folders, part by part, and tiny random ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from modiff.errors import CheckpointError, ConfigError
from modiff.storage.hashing import hash_files, hash_text
from modiff.teachers.architectures import ARCHITECTURES, random_denoiser
from modiff.teachers.catalog import ZOO, TeacherSpec
from modiff.teachers.convert.dit import OriginalDiTTransformer2DModel
from modiff.teachers.convert.ldm import FixedHeadsUNet2DModel
from modiff.teachers.families import FAMILIES, Family
from modiff.teachers.patched import PatchedUNet2DModel
from modiff.teachers.teacher import Teacher, decoder_factor
from modiff.teachers.text import make_encoder
from modiff.teachers.tiny import tiny_model

_OWN = {cls.__name__: cls for cls in (FixedHeadsUNet2DModel, OriginalDiTTransformer2DModel, PatchedUNet2DModel)}
_DECODERS = ("AutoencoderKL", "AutoencoderDC", "VQModel")


def load(spec: TeacherSpec) -> Teacher:
    """Load a teacher from its folder; arguments and errors are those of :func:`modiff.teachers.zoo.load_teacher`."""
    folder = spec.locate()
    part, config = _denoiser_config(spec, folder)
    scheduler = _first(folder, "scheduler/scheduler_config.json", "scheduler_config.json")
    decoder_part = next((p for p in ("vqvae", "vae") if (folder / p / "config.json").is_file()), None)
    if scheduler is None or not _weights(part):
        missing = folder / "scheduler" / "scheduler_config.json" if scheduler is None else part / _WEIGHTS
        raise CheckpointError(
            f"Teacher {spec.title!r}: {missing} does not exist. Give model.teacher.path a diffusers pipeline folder "
            "with unet/ or transformer/ and scheduler/, such as `modiff train` exports."
        )
    family = find_family(config, decoder_part is not None)
    try:
        denoiser = _model(part, config)
        decoder = _model(folder / decoder_part) if decoder_part and family.latent else None
        scheduler_config = json.loads(scheduler.read_text())
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"Teacher {spec.title!r}: the files in {folder} are damaged or of another architecture ({first}). "
            "Copy or train them again."
        ) from error
    files = [*_weights(part), part / "config.json", scheduler]
    files += [*_weights(folder / decoder_part), folder / decoder_part / "config.json"] if decoder is not None else []
    teacher = _assemble(spec, family, denoiser, decoder, scheduler_config, hash_files(files, trust_names=True)[:16])
    if family.condition == "text":
        teacher.encode = make_encoder(folder, family, lambda: next(denoiser.parameters()).device)
    return teacher


def load_tiny(spec: TeacherSpec) -> Teacher:
    """Make a tiny random teacher of the class that the zoo names."""
    entry = spec.entry
    family = FAMILIES[entry.family.split("-")[0]]
    denoiser, decoder = tiny_model(entry.family, channels=1 if spec.name == "mnist" else 3)
    return _assemble(spec, family, denoiser, decoder, dict(family.schedule), f"tiny-{entry.family}")


def load_random(spec: TeacherSpec) -> Teacher:
    """Make the architecture at full size with random weights; of a folder only the configuration is read."""
    folder = spec.entry.folder or ZOO[spec.name].folder
    kind = spec.entry.family
    family = FAMILIES[kind.split("-")[0]]
    config = None
    if folder is not None:
        config = _denoiser_config(spec, folder)[1]
        family = find_family(config, any((folder / part).is_dir() for part in ("vqvae", "vae")))
    denoiser = random_denoiser(spec.title, config or ARCHITECTURES.get(spec.name))
    decoder = tiny_model(kind)[1] if family.latent else None
    content = json.dumps(dict(denoiser.config), sort_keys=True, default=str)
    content = f"random-{hash_text(content)[:16]}"
    return _assemble(spec, family, denoiser, decoder, dict(family.schedule), content)


def find_family(config: dict[str, Any], has_decoder: bool) -> Family:
    """Find the family of a denoiser from its ``config.json``.

    Raises:
        ConfigError: There is none for its class.
    """
    name = str(config.get("_class_name"))
    if name in FAMILIES["pixel"].denoiser:
        return FAMILIES["latent" if has_decoder else "pixel"]
    if name == "UNet2DConditionModel":
        return FAMILIES["sdxl" if config.get("addition_embed_type") == "text_time" else "sd"]
    if name == "Transformer2DModel":  # what DiT and PixArt were called before they had classes of their own
        return FAMILIES["dit" if config.get("norm_type") == "ada_norm_zero" else "pixart"]
    found = next((family for family in FAMILIES.values() if name in family.denoiser), None)
    if found is None:
        allowed = sorted({n for family in FAMILIES.values() for n in family.denoiser})
        raise ConfigError(
            f"The teacher's denoiser is a {name}, which modiff evaluate cannot call; allowed are {', '.join(allowed)}. "
            "For any other pipeline use modiff.quantize_pipeline."
        )
    return found


def _denoiser_config(spec: TeacherSpec, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Find the denoiser's folder and config; the oldest repositories of the hub hold it at the top."""
    file = _first(folder, "unet/config.json", "transformer/config.json", "config.json")
    if file is None:
        raise CheckpointError(
            f"Teacher {spec.title!r}: {folder / 'unet' / 'config.json'} does not exist, so the pipeline has no "
            "denoiser. Give model.teacher.path a diffusers pipeline folder with unet/ or transformer/ and scheduler/, "
            "such as `modiff train` exports."
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"Teacher {spec.title!r}: the files in {folder} are damaged ({file}: {error}). Copy or train them again."
        ) from error
    return file.parent, config


_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _weights(part: Path) -> list[Path]:
    """List the weight files of a part, safetensors before pickles, without those of other precisions."""
    for pattern in (
        r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors",
        r"diffusion_pytorch_model(-\d+-of-\d+)?\.bin",
    ):
        found = sorted(file for file in part.glob("diffusion_pytorch_model*") if re.fullmatch(pattern, file.name))
        if found:
            return found
    return []


def _model(part: Path, config: dict[str, Any] | None = None) -> nn.Module:
    config = config or json.loads((part / "config.json").read_text())
    name = str(config.get("_class_name"))
    cls = _OWN.get(name) or getattr(diffusers, name, None)
    if cls is None or (part.name in ("vae", "vqvae") and name not in _DECODERS):
        raise ValueError(f"{part / 'config.json'} names the class {name}")
    files = _weights(part)
    model = cls.from_pretrained(
        part,
        local_files_only=True,
        use_safetensors=not files or files[0].suffix == ".safetensors",  # pickles are read with weights_only
        low_cpu_mem_usage=False,
        torch_dtype=torch.float32,
    )
    for tensor in (*model.parameters(), *model.buffers()):
        # Loaded weights are views into a mapped file whose alignment varies, and with it the last bits of a product.
        tensor.data = tensor.data.clone()
    return model


def _assemble(
    spec: TeacherSpec,
    family: Family,
    denoiser: nn.Module,
    decoder: nn.Module | None,
    scheduler_config: dict[str, Any],
    content: str,
) -> Teacher:
    if family.latent and decoder is None:
        raise CheckpointError(
            f"Teacher {spec.title!r} draws latents, but its folder has neither vae/ nor vqvae/. "
            "Give the whole pipeline."
        )
    height, width = _size(spec, denoiser, decoder)
    if "FluxTransformer2DModel" in family.denoiser:
        scheduler_config = {**scheduler_config, "image_seq_len": height * width // 4}
    for module in (denoiser, decoder):
        if module is not None:
            module.eval().requires_grad_(False)
    return Teacher(
        denoiser=denoiser,
        scheduler_config=scheduler_config,
        sample_shape=(family.channels(denoiser.config), height, width),
        fingerprint=content,
        family=family,
        decoder=decoder,
        guidance=spec.entry.guidance,
    )


def _size(spec: TeacherSpec, denoiser: nn.Module, decoder: nn.Module | None) -> tuple[int, int]:
    """Return height and width of x_t.

    Raises:
        ConfigError: The image size is no multiple of what the model halves.
    """
    config, factor = denoiser.config, decoder_factor(decoder) if decoder is not None else 1
    own = getattr(config, "sample_size", None)
    if spec.image_size is None and own is not None:
        height, width = (own, own) if isinstance(own, int) else own
        return int(height), int(width)
    # FLUX takes any size; a tiny model of it draws 16 pixels.
    size = spec.image_size or (8 * factor if spec.tiny else spec.entry.image_size or 1024)
    widths = getattr(config, "block_out_channels", None)
    patch = 2 ** (len(widths) - 1) if widths else max(2, int(getattr(config, "patch_size", 1)))
    if size % (factor * patch):
        raise ConfigError(
            f"model.teacher.image_size is {size}, but this model draws multiples of {factor * patch} pixels. Give one, "
            f"for example {max(1, round(size / (factor * patch))) * factor * patch}."
        )
    return size // factor, size // factor


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
