"""Prompts to embeddings, by the pipeline's own text encoders (extra ``modiff[text]``)."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modiff.errors import CheckpointError, ConfigError
from modiff.teachers.families import Family


def make_encoder(folder: Path, family: Family, device: Callable[[], torch.device]) -> Callable[..., dict[str, Tensor]]:
    """Make ``encode(prompts, guided)`` of the pipeline in ``folder``; its text encoders are loaded at the first call.

    Args:
        folder: A diffusers pipeline folder.
        family: Names what the pipeline's ``encode_prompt`` returns.
        device: Where the encoders run, asked at every call.

    Returns:
        A function of prompts and of whether the empty prompt's rows shall follow; tensors by the denoiser's argument.

    Raises:
        ConfigError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "A text-to-image teacher needs the text encoders of transformers, which is not installed. "
            "Run: pip install 'modiff[text]'; or try the recipe with --model.teacher.tiny true."
        )
    loaded: list[Any] = []

    @torch.no_grad()
    def encode(prompts: list[str], guided: bool) -> dict[str, Tensor]:
        if not loaded:
            loaded.append(_load(folder))
        pipeline = loaded[0].to(device())
        return name_encodings(call_encode_prompt(pipeline, prompts, guided), family, guided)

    return encode


def _load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, **{part: None for part in absent_parts(folder)}
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"The text encoders in {folder} cannot be loaded ({first}). Download them again."
        ) from error


def absent_parts(folder: Path) -> list[str]:
    """List the parts of a pipeline that encoding text does not need, of those it has."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = ("unet", "transformer", "vae", "safety_checker", "feature_extractor", "image_encoder")
    return [part for part in parts if part in index]


def call_encode_prompt(pipeline: Any, prompts: list[str], guided: bool) -> tuple[Any, ...]:
    """Call ``pipeline.encode_prompt`` with the defaults of the pipeline's own call (length, cleaning, instruction)."""
    allowed = inspect.signature(pipeline.encode_prompt).parameters
    own = inspect.signature(type(pipeline).__call__).parameters
    arguments: dict[str, Any] = {
        name: own[name].default
        for name in allowed
        if name in own and own[name].default not in (None, inspect.Parameter.empty)
    }
    arguments.update(prompt=prompts, num_images_per_prompt=1)
    if "prompt_2" in allowed:
        arguments["prompt_2"] = None
    if "prompt_3" in allowed:
        arguments["prompt_3"] = None
    if "do_classifier_free_guidance" in allowed:
        arguments["do_classifier_free_guidance"] = guided
    if "device" in allowed:
        arguments["device"] = pipeline.device
    return tuple(pipeline.encode_prompt(**arguments))


def name_encodings(encodings: tuple[Any, ...], family: Family, guided: bool) -> dict[str, Tensor]:
    """Name what ``encode_prompt`` returned by the denoiser's arguments; the empty prompt's rows come last."""
    found = dict(zip(family.encodings, encodings, strict=True))
    named = {name: value for name, value in found.items() if name and not name.startswith("-")}
    if not guided:
        return named
    return {name: torch.cat([value, found[f"-{name}"]]) for name, value in named.items()}
