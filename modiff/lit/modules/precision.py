"""Arguments of a denoiser in its own precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modiff.teachers.families import first_tensor


def dtype_of(denoiser: nn.Module | None) -> torch.dtype:
    """Of a denoiser's parameters: a true precision of the Trainer's changes it, autocast does not."""
    assert denoiser is not None
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)


def casting(denoiser: nn.Module) -> Callable[..., Tensor]:
    """A denoiser that is given its arguments in its own dtype; a function, which has none, gets them as they are."""

    def evaluate(*args: Any, **kwargs: Any) -> Tensor:
        if isinstance(denoiser, nn.Module):
            args, kwargs = in_dtype((args, kwargs), dtype_of(denoiser))
        return first_tensor(denoiser(*args, **kwargs))

    return evaluate


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Arguments of a denoiser with every float tensor in a dtype; vectors stay, because time steps must not be rounded.

    >>> x, t = in_dtype((torch.zeros(2, 3), torch.tensor([0.1])), torch.float64)
    >>> x.dtype, t.dtype
    (torch.float64, torch.float32)
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, dict):
        return {key: in_dtype(item, dtype) for key, item in value.items()}
    return type(value)(in_dtype(item, dtype) for item in value) if isinstance(value, (tuple, list)) else value
