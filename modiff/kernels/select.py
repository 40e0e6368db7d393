"""Which backend an operator gets, and why: the fastest one that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from modiff.kernels import float as _float  # noqa: F401 (registers itself)
from modiff.kernels import onednn as _onednn  # noqa: F401
from modiff.kernels.backend import BACKENDS, Backend, OperatorShape, Quantizer
from modiff.kernels.cpp import backend as _cpp  # noqa: F401
from modiff.kernels.triton import backend as _triton  # noqa: F401

DEFINITION = "simulate"


@dataclass(frozen=True)
class Choice:
    """The backend of an operator.

    Args:
        name: Of the backend.
        reason: Why the operator is simulated although another backend was asked for; an empty string where it is not.
    """

    name: str
    reason: str = ""

    @property
    def backend(self) -> Backend:
        """The backend itself."""
        return BACKENDS[self.name]

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose(
    asked: str, shape: OperatorShape, quantizer: Quantizer | None, device: torch.device, dtype: torch.dtype
) -> Choice:
    """The fastest backend that is exact, or the float one with the reasons against all faster ones.

    Args:
        asked: Name of a backend, or ``auto`` for any.
        shape: The operator; its weight's quantization is part of it.
        quantizer: Of its input; None: it is not quantized.
        device: Of the input.
        dtype: In which differences are taken: float32, or float64.
    """
    if asked == DEFINITION:
        return Choice(DEFINITION)
    if shape.weight is None or quantizer is None:
        return Choice(DEFINITION, f"its {'weights' if shape.weight is None else 'activations'} are not quantized")
    reasons, elsewhere = [], []
    for backend in BACKENDS.values():
        if backend.name == DEFINITION and asked == "auto":
            break  # what follows is slower
        if asked not in ("auto", backend.name):
            continue
        if backend.devices and device.type not in backend.devices:
            elsewhere.append(f"{backend.name} runs on {' and '.join(backend.devices)}, not on {device.type}")
            continue
        reason = backend.obstacle(shape, quantizer, device, dtype)
        if reason is None:
            return Choice(backend.name)
        reasons.append(reason)
    return Choice(DEFINITION, "; ".join(dict.fromkeys(reasons or elsewhere)))
