"""Refuses methods of denoisers and pipelines that act on the original operators, past the quantized ones."""

from __future__ import annotations

from typing import Any

from torch import nn

from modiff.errors import ConfigError

ADAPTERS = (
    "load_lora_weights",
    "load_lora_adapter",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora",
    "unload_lora_weights",
    "add_adapter",
    "set_adapter",
    "set_adapters",
    "enable_adapters",
    "disable_adapters",
    "enable_lora",
    "disable_lora",
    "delete_adapters",
    "load_attn_procs",
)
OFFLOADS = "moves the weight of each operator, which modiff keeps packed. Use enable_model_cpu_offload of the pipeline"
FUSES = "would replace quantized operators by full-precision ones. {restore}, fuse, and quantize again"
SAVES = (
    "would save the student under names that from_pretrained does not know. Save it by "
    "modiff.save({denoiser}, folder), or restore it first"
)
CACHES = (
    "skips modules whose operators keep a state; the two do not combine. Use one of them, or modiff's own reuse of "
    "blocks, which combines with modulation: QuantConfig.schedule (docs/frontier.md)"
)
MOVES = "moves or casts operators that modiff quantizes. Disable it, or load the model without it"
WHY = {
    "save_pretrained": SAVES,
    "push_to_hub": SAVES,
    "enable_sequential_cpu_offload": OFFLOADS,
    "enable_group_offload": OFFLOADS,
    "enable_layerwise_casting": "would cast the weight of each operator, which modiff keeps packed. Leave it out",
    "enable_cache": CACHES,
    "to_empty": "would leave its codes and scales without content. {restore} first, or make the student after it",
    "fuse_qkv_projections": FUSES,
    "unfuse_qkv_projections": FUSES,
    **dict.fromkeys(
        ADAPTERS,
        "would change the original weights, not the quantized ones. {restore}, change the adapters, fuse them, and "
        "quantize again",
    ),
}


def reason(method: str, pipeline: bool) -> str:
    """Why a method is refused, and what to do instead."""
    restore = "Call modiff.restore_pipeline(pipe)" if pipeline else "Call modiff.restore(student)"
    return WHY[method].format(restore=restore, denoiser="pipe.unet" if pipeline else "student")


class Refusal:
    """Stands on a student for a method of its class.

    Args:
        method: Its name.
        owner: Name of the student's class.
    """

    def __init__(self, method: str, owner: str) -> None:
        self.method = method
        self.owner = owner

    def __call__(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.method} on a quantized {self.owner} {reason(self.method, pipeline=False)}.")


def refuse_hooks(model: nn.Module, stateful: bool) -> None:
    """Refuse hooks of diffusers that act on operators; caches are allowed where no operator keeps a state.

    Args:
        model: Student, or what becomes one.
        stateful: It keeps state between evaluations.

    Raises:
        ConfigError: There is such a hook.
    """
    for name, module in model.named_modules():
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}
        for hook in hooks:
            moves = any(part in hook for part in ("offload", "casting", "lazy", "tracker", "cp_", "autocast"))
            if moves or stateful:
                where = f"module {name!r} of the {type(model).__name__}" if name else f"the {type(model).__name__}"
                raise ConfigError(f"The diffusers hook {hook!r} on {where} {MOVES if moves else CACHES}.")


def refuse_methods(student: nn.Module, stateful: bool) -> None:
    """Put refusals in the places of a student's methods.

    Args:
        student: The student.
        stateful: It keeps state between evaluations, which caches would not know of.
    """
    for name in WHY:
        if hasattr(type(student), name) and (stateful or WHY[name] is not CACHES):
            vars(student)[name] = Refusal(name, type(student).__name__)


def allow_methods(student: nn.Module) -> None:
    """Give a student's methods back."""
    for name in WHY:
        if isinstance(vars(student).get(name), Refusal):
            del vars(student)[name]
