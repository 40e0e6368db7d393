"""Second moments of an operator's inputs: all that layer-wise reconstruction needs to know of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modiff.errors import CalibrationError
from modiff.kernels.transposed import stuffed
from modiff.operators.adapters import ConvTransposeAdapter
from modiff.operators.quantized import QuantizedOperator

TRANSPOSED = ConvTransposeAdapter.types


@dataclass
class Moments:
    """Sums over input vectors ``x`` of a student's operator and the teacher's outputs ``y`` at the same places.

    With them the error of any weight, ``sum ||W x - y||^2``, is known without the data.

    Args:
        hessian: ``sum x x^T``, float32 ``[groups, K, K]``; K is the input channels of a conv group times the kernel.
        cross: ``sum y x^T``, the bias taken off y; float32 ``[groups, out / groups, K]``.
        power: ``sum ||y||^2``, float32 scalar.
        count: Number of vectors.
    """

    hessian: Tensor
    cross: Tensor
    power: Tensor
    count: int = 0

    @classmethod
    def empty(cls, operator: QuantizedOperator) -> Moments:
        """Return the moments of no vectors at all."""
        groups, out, size = group_shape(operator)
        device = operator.module.weight.device
        hessian = torch.zeros(groups, size, size, device=device)
        return cls(hessian, torch.zeros(groups, out, size, device=device), torch.zeros((), device=device))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add vectors ``x`` ``[n, groups, K]`` with targets ``y`` ``[n, groups, out / groups]``."""
        x, y = x.float().transpose(0, 1), y.float().transpose(0, 1)
        self.hessian.baddbmm_(x.mT, x)
        self.cross.baddbmm_(y.mT, x)
        self.power += y.square().sum()
        self.count += x.shape[1]

    def damped(self, damping: float) -> Tensor:
        """Add ``damping`` times the mean diagonal to the diagonal of the Hessian, ``[groups, K, K]``."""
        mean = self.hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
        return self.hessian + torch.diag_embed((damping * mean)[:, None].expand(self.hessian.shape[:2]))

    def check(self, name: str) -> None:
        """Refuse moments to which no weight can be fitted.

        Raises:
            CalibrationError: Nothing was captured, or sums overflowed.
        """
        if self.count == 0:
            raise no_data(name)
        if not torch.isfinite(self.hessian).all() or not torch.isfinite(self.cross).all():
            raise CalibrationError(
                f"The moments of operator {name!r} are not finite: its activations are too large for float32. Keep it "
                f"in full precision: Rule({name!r}, weight=None)."
            )


def no_data(name: str) -> CalibrationError:
    """Make the error for an operator that the calibration's run never called."""
    return CalibrationError(
        f"No data captured for operator {name!r}: the run that was given never calls it. Let run(student) sample "
        f"whole trajectories, or exclude the operator with Rule({name!r}, skip=True)."
    )


def group_shape(operator: QuantizedOperator) -> tuple[int, int, int]:
    """Return ``(groups, output channels of a group, K)`` of an operator."""
    shape = operator.shape
    size = shape.in_channels // shape.groups * math.prod(shape.kernel)
    return shape.groups, shape.out_channels // shape.groups, size


def moment_bytes(operator: QuantizedOperator) -> int:
    """Return the bytes that an operator's :class:`Moments` take."""
    groups, out, size = group_shape(operator)
    return 4 * groups * size * (size + out)


def input_vectors(module: Any, kind: str, x: Tensor, positions: Tensor) -> Tensor:
    """Gather the input vectors of a Linear or Conv at given places of its output.

    Args:
        module: The original operator; any stride, padding, padding mode, dilation and groups.
        kind: ``linear`` or ``conv`` (transposed ones too).
        x: Its input, batched.
        positions: int64 ``[n]``, indices into the output's places: ``[batch, *spatial]`` of a Conv, all dims but the
            last of a Linear, flattened.

    Returns:
        ``[n, groups, K]``: the output at these places is ``einsum('ngk,gok->ngo', vectors, weight)``, with the weight
        as ``[groups, out / groups, K]``.

    >>> conv = torch.nn.Conv2d(2, 3, 3)
    >>> input_vectors(conv, "conv", torch.ones(1, 2, 5, 5), torch.arange(9)).shape
    torch.Size([9, 1, 18])
    """
    if kind == "linear":
        return x.reshape(-1, x.shape[-1])[positions][:, None]
    spatial = x.ndim - 2
    if isinstance(module, TRANSPOSED):
        shape = ConvTransposeAdapter().shape(module)
        windows = stuffed(x, shape)
        for dim, (kernel, dilation) in enumerate(zip(shape.kernel, shape.dilation, strict=True)):
            windows = windows.unfold(dim + 2, (kernel - 1) * dilation + 1, 1)[..., ::dilation]
        return _chosen(windows.flip(tuple(range(2 + spatial, 2 + 2 * spatial))), positions, spatial, module.groups)
    # PyTorch keeps the padding that the kernel needs here, whether it was given as numbers or as 'same'.
    pad = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(x, pad, mode=mode) if any(pad) else x
    for dim in range(spatial):
        reach = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
        windows = windows.unfold(dim + 2, reach, module.stride[dim])[..., :: module.dilation[dim]]
    return _chosen(windows, positions, spatial, module.groups)


def _chosen(windows: Tensor, positions: Tensor, spatial: int, groups: int) -> Tensor:
    """Copy the windows asked for; all of them are views ``[batch, in, *places, *kernel]``."""
    places = torch.unravel_index(positions, (windows.shape[0], *windows.shape[2 : 2 + spatial]))
    return windows.movedim(1, 1 + spatial)[places].reshape(len(positions), groups, -1)


def output_vectors(module: Any, kind: str, y: Tensor, positions: Tensor) -> Tensor:
    """Gather the outputs at the same places, without the bias: ``[n, groups, out / groups]``."""
    y = (y if kind == "linear" else y.movedim(1, -1)).reshape(-1, y.shape[-1 if kind == "linear" else 1])[positions]
    if module.bias is not None:
        y = y - module.bias.detach()
    return y.unflatten(-1, (int(getattr(module, "groups", 1)), -1))


def num_positions(kind: str, y: Tensor) -> int:
    """Return how many input vectors an output ``y`` comes from."""
    return y.numel() // y.shape[-1 if kind == "linear" else 1]


def batched(operator: QuantizedOperator, x: Tensor, ndim: int | None = None) -> Tensor:
    """Give ``x`` a batch dim where the operator was called with a single sample.

    Args:
        operator: Of the student.
        x: An input or output of the call.
        ndim: Dims of the call's input; None: ``x`` is that input.
    """
    return x if operator.adapter.is_batched(operator.module, ndim or x.ndim) else x[None]
