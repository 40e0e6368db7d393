"""Memory that eager mode uses again and again: fresh memory for each residual would cost a page fault per 4 KiB."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_LOCAL = threading.local()
_Key = tuple[torch.device, torch.dtype, int]


def scratch(like: Tensor, dtype: torch.dtype | None = None, index: int = 0) -> Tensor:
    """Uninitialized memory in the shape and strides of a tensor, shared by all operators of a thread.

    It is valid until the next call for the same device, dtype and index. Of a tensor with gaps or overlaps, such as a
    half of a split input, it keeps the order of the dims, as :func:`torch.empty_like` does.

    Args:
        like: The tensor.
        dtype: Of the memory; None: the tensor's.
        index: Two of the same dtype are told apart by it.
    """
    dtype = dtype or like.dtype
    if like.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph holds addresses: it gets memory of its own
        return torch.empty_like(like, dtype=dtype)
    buffers: dict[_Key, Tensor] = _LOCAL.__dict__  # type: ignore[assignment]
    key = (like.device, dtype, index)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < like.numel():
        with torch.inference_mode(False):
            buffer = torch.empty(like.numel(), dtype=dtype, device=like.device)
        buffers[key] = buffer
    return buffer.as_strided(like.shape, dense_strides(like))


def free_scratch() -> None:
    """Let go of this thread's memory."""
    _LOCAL.__dict__.clear()


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a tensor with the gaps and overlaps of its memory taken out."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def is_dense(x: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, in some order of its dims."""
    return dense_strides(x) == x.stride()
