"""The one place that answers: is this call computed, advanced, or is its last output reused?

Operators, modules whose output is kept, and compiled regions all ask here. A schedule that reuses or extrapolates whole
blocks is one more answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from torch import Tensor

from modiff.config.schedule import ReuseSchedule
from modiff.config.specs import Modulation
from modiff.trajectory.cache import BranchCache, OperatorCache
from modiff.trajectory.identity import KeptOutput


class Answer(Enum):
    """What a call does.

    Attributes:
        COMPUTE: The product of the input itself in full precision: a warm-up or refresh (equations 8 and 9).
        REFINE: The product of the input itself in quantized rounds: the integer warm-up.
        ADVANCE: The product of the quantized difference (equations 13 and 14).
        REUSE: No product: the input is the last one, so the difference is 0 (trap 10).
    """

    COMPUTE = "compute"
    REFINE = "refine"
    ADVANCE = "advance"
    REUSE = "reuse"


class Schedule:
    """Decides from the place in a trajectory and from what is kept; holds no state of its own."""

    def operator(self, evaluation: int, cache: OperatorCache | None, x: Tensor, modulation: Modulation) -> Answer:
        """What an operator does with its input.

        Args:
            evaluation: From 0, in the current context.
            cache: Of this call; None in the first evaluation.
            x: The input.
            modulation: Of the operator.
        """
        if cache is None:
            return Answer.REFINE if modulation.warmup == "refine" else Answer.COMPUTE
        if cache.source is not None and cache.source.matches(x):
            return Answer.REUSE
        return Answer.COMPUTE if self.refreshes(evaluation, modulation) else Answer.ADVANCE

    def block(self, plan: ReuseSchedule, name: str, evaluation: int, cache: BranchCache, x: Tensor) -> Answer:
        """Whether a block runs, or its kept branch stands in for it.

        Args:
            plan: Which blocks may be skipped, and when.
            name: Of the block.
            evaluation: From 0, in the current context.
            cache: Of this call.
            x: The block's first input.
        """
        needed = 2 if plan.mode == "extrapolate" else 1
        if len(cache.kept) < needed:
            return Answer.COMPUTE
        if plan.threshold is None:
            return Answer.REUSE if plan.skips(name, evaluation) else Answer.COMPUTE
        if cache.input is None or evaluation < plan.warmup:
            return Answer.COMPUTE
        changed = (x - cache.input).float().norm() / cache.input.float().norm().clamp_min(1e-12)
        return Answer.REUSE if bool(changed < plan.threshold) else Answer.COMPUTE

    def refreshes(self, evaluation: int, modulation: Modulation) -> bool:
        """Whether an evaluation is a full-precision refresh."""
        every = modulation.refresh_every
        return every is not None and evaluation > 0 and evaluation % every == 0

    def traced(self, cache: OperatorCache, arguments: Iterable[Tensor]) -> Answer:
        """What a call inside a graph does, decided before the graph runs: it sees the denoiser's arguments only."""
        source = cache.source
        same = source is not None and any(source.matches(argument) for argument in arguments)
        return Answer.REUSE if same else Answer.ADVANCE

    def module(self, kept: KeptOutput | None, x: Tensor, output: Tensor) -> Answer:
        """Whether a module whose output depends on its input only gives its kept output again."""
        same = kept is not None and kept.output.shape == output.shape and kept.holds(x)
        return Answer.REUSE if same else Answer.COMPUTE

    def keeps_output(self, name: str, class_name: str, modulations: Iterable[Modulation]) -> bool:
        """Whether a denoiser's child only carries a fixed prompt to the operators behind it (trap 10).

        Such as diffusers' PixArt and Sana have: each call gives it the same prompt, and makes a new tensor of it. Only
        known ones are taken, and only where their operators give the very same output for the same input: an integer
        warm-up goes on refining, and a rounded state differs from the first output.

        Args:
            name: Of the child.
            class_name: Of its class.
            modulations: Of the modulated operators inside.
        """
        known = PROMPT_MODULES.get(name) == class_name
        return known and all(m.warmup == "full" and m.state_dtype in (None, "float32") for m in modulations)


PROMPT_MODULES = {"caption_projection": "PixArtAlphaTextProjection", "caption_norm": "RMSNorm"}
"""Modules between a model's prompt and its cross-attention, by name, with their class."""
SCHEDULE = Schedule()
