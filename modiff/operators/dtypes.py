"""Which dtype and layout an operator computes in, and answers in."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout of a convolution's weight: contiguous, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.ndim, torch.contiguous_format)
    return last if tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous() else torch.contiguous_format


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the original would answer; autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def compute_input(x: Tensor) -> Tensor:
    """The input in the dtype of differences and scales: float32, or float64 when it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
