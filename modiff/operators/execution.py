"""How an operator's products run: as was chosen for a kind of input, and what a graph may read of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from modiff.kernels.backend import Backend, Prepared, Quantizer
from modiff.trajectory.cache import OperatorCache


class Execution(NamedTuple):
    """How an operator's products run, for inputs of one device, dtype and number of dims.

    Args:
        backend: Runs them.
        prepared: The weight for it; None: the original's, in full precision.
        quantizer: Of the input.
        unclipped: The same quantizer in an integer warm-up: dynamic and not clipped.
    """

    backend: Backend
    prepared: Prepared | None
    quantizer: Quantizer
    unclipped: Quantizer


@dataclass
class Region:
    """What an operator inside a compiled region may read: set outside of it, before each evaluation.

    Args:
        caches: Of its calls, in their order; empty for plain quantization.
        reuses: Which of the calls give their last output again; numbers, for a graph is not guarded by enums.
        execution: How its products run; None before it ran eagerly.
        shape: Of an input that ran eagerly.
        call: Calls so far in this evaluation.
    """

    caches: list[OperatorCache] = field(default_factory=list)
    reuses: tuple[bool, ...] = ()
    execution: Execution | None = None
    shape: torch.Size | None = None
    call: int = 0
