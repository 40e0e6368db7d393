"""Which modules only carry a fixed prompt to the operators behind them (trap 10 of METHOD.md)."""

from __future__ import annotations

from torch import nn

from modiff.operators.modulated import ModulatedOperator

KNOWN = {"caption_projection": "PixArtAlphaTextProjection", "caption_norm": "RMSNorm"}  # by name, their class


def projections(model: nn.Module) -> list[str]:
    """Modules between a model's prompt and its cross-attention, whose output is fixed where the prompt is.

    Such as diffusers' PixArt and Sana have: each call gives them the same prompt, and makes a new tensor of it. Only
    known ones are taken, and only where their operators give the very same output for the same input: an integer
    warm-up goes on refining, and a rounded state differs from the first output.
    """
    found = []
    for name, module in model.named_children():
        if KNOWN.get(name) != type(module).__name__:
            continue
        modulations = [m.modulation for m in module.modules() if isinstance(m, ModulatedOperator)]
        if all(m.warmup == "full" and m.state_dtype in (None, "float32") for m in modulations):
            found.append(name)
    return found
