"""One evaluation before there is a student: with an example of the user's, or on tensors without content."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import ConfigError

PROMPT = 77
"""Tokens of an example prompt."""


def call_example(model: nn.Module, example: Any) -> Any:
    """Call a denoiser with arguments that the user gave for it.

    Args:
        model: The denoiser.
        example: A tuple of arguments, or a mapping of keywords.

    Raises:
        ConfigError: It cannot be called so.
    """
    args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
    try:
        with torch.no_grad():
            return model(*(args if isinstance(args, (tuple, list)) else (args,)), **kwargs)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The denoiser cannot be called with example_inputs ({reason}). Give the arguments of its forward: "
            "quantize(model, config, example_inputs=(x, t))."
        ) from error


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes and no content, and which takes no memory for them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                empty = tensor.detach().to("meta")
                memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def example_of(model: nn.Module) -> dict[str, Any] | None:
    """Arguments without content for a network of diffusers, as far as its configuration tells their shapes.

    Returns:
        Keywords of its forward; None for other networks, and for those whose images may have any size.
    """
    known = any(cls.__module__.startswith("diffusers.models.") for cls in type(model).__mro__)
    hooked = any("_hf_hook" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    config = getattr(model, "config", None)
    if not known or hooked or config is None:
        return None
    example: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(model).forward).parameters.items():
        if name == "self":
            continue
        value = _argument(name, config, required=parameter.default is inspect.Parameter.empty)
        if value is not None:
            example[name] = value
        elif parameter.default is inspect.Parameter.empty:
            return None
    return example if {"sample", "hidden_states"} & set(example) else None


def _argument(name: str, config: Any, required: bool) -> Any:
    """One argument of a denoiser's forward; None where its shape is not known."""

    def of(*keys: str) -> Any:
        return next((value for key in keys if (value := config.get(key)) is not None), None)

    if name in ("sample", "hidden_states"):
        return _image(of("sample_size"), of("in_channels"))
    if name == "timestep":
        return _empty(1)
    if name == "encoder_hidden_states":
        width = of("joint_attention_dim", "caption_channels", "cross_attention_dim", "encoder_hid_dim")
        width = width[0] if isinstance(width, (tuple, list)) else width
        return _empty(1, PROMPT, width) if isinstance(width, int) else None
    if name == "pooled_projections" and isinstance(of("pooled_projection_dim"), int):
        return _empty(1, config["pooled_projection_dim"])
    if name == "class_labels" and required | (of("num_embeds_ada_norm", "num_class_embeds") is not None):
        return torch.zeros(1, dtype=torch.long, device="meta")
    if name == "added_cond_kwargs":
        return _added(config)
    return None


def _image(size: Any, channels: Any) -> Tensor | None:
    height, width = size if isinstance(size, (tuple, list)) and len(size) == 2 else (size, size)
    known = all(isinstance(number, int) for number in (height, width, channels))
    return _empty(1, channels, height, width) if known else None


def _added(config: Any) -> dict[str, Tensor | None]:
    """What SDXL's networks take beside the prompt, and PixArt's may."""
    width, each = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    if config.get("addition_embed_type") == "text_time" and isinstance(width, int) and isinstance(each, int):
        return {"text_embeds": _empty(1, width - 6 * each), "time_ids": _empty(1, 6)}
    return {"resolution": None, "aspect_ratio": None}


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
