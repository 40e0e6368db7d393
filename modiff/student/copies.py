"""Copies of a model that share its tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from modiff.operators.rewrites import rewritten
from modiff.student.tensors import slots


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a model: modules of its own, the very parameters and buffers of the model."""
    kept: dict[int, Any] = {id(slot.tensor): slot.tensor for slot in slots(model)}
    kept |= {id(whole.original): whole.original for _, whole in rewritten(model)}
    return copy.deepcopy(model, kept)
