"""A transposed convolution as a convolution: the same sums, on an input with zeros between its values.

Every weight here is canonical: ``[out, in / groups, *kernel]``, as of a convolution; PyTorch keeps that of a transposed
one as ``[in, out / groups, *kernel]``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modiff.kernels.backend import OperatorShape


def canonical(weight: Tensor, groups: int) -> Tensor:
    """PyTorch's weight of a transposed convolution with the output's channels in front.

    >>> import torch
    >>> canonical(torch.zeros(4, 6, 3), groups=2).shape
    torch.Size([12, 2, 3])
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])


def native(weight: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`canonical`.

    >>> import torch
    >>> native(torch.zeros(12, 2, 3), groups=2).shape
    torch.Size([4, 6, 3])
    """
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])


def as_convolution(shape: OperatorShape) -> OperatorShape:
    """The convolution that gives the same sums of :func:`stuffed` inputs and :func:`flipped` weights."""
    return OperatorShape(
        "conv",
        shape.in_channels,
        shape.out_channels,
        shape.weight,
        kernel=shape.kernel,
        stride=(1,) * len(shape.kernel),
        padding=((0, 0),) * len(shape.kernel),
        dilation=shape.dilation,
        groups=shape.groups,
    )


def borders(shape: OperatorShape) -> list[tuple[int, int]]:
    """Zeros around each spatial dim of a stuffed input; negative ones are cut off."""
    reach = [d * (k - 1) for d, k in zip(shape.dilation, shape.kernel, strict=True)]
    sizes = zip(reach, shape.padding, shape.output_padding, strict=True)
    return [(r - low, r - high + extra) for r, (low, high), extra in sizes]


def stuffed(x: Tensor, shape: OperatorShape, zero: float = 0) -> Tensor:
    """The input with ``stride - 1`` zeros between its values and :func:`borders` of zeros around them.

    Args:
        x: ``[B, in, *spatial]`` or without the batch; values or codes.
        shape: Of the transposed convolution.
        zero: What stands for 0.
    """
    rank = len(shape.kernel)
    inner = [(size - 1) * step + 1 for size, step in zip(x.shape[-rank:], shape.stride, strict=True)]
    around = borders(shape)
    sizes = [size + low + high for size, (low, high) in zip(inner, around, strict=True)]
    out = x.new_full((*x.shape[:-rank], *sizes), zero)
    source: list[Any] = [...]
    target: list[Any] = [...]
    for size, (low, _), step, whole in zip(x.shape[-rank:], around, shape.stride, sizes, strict=True):
        first, last = (
            max(0, -(low // step)),
            min(size - 1, (whole - 1 - low) // step),
        )  # negative borders cut values off
        source.append(slice(first, last + 1))
        target.append(slice(low + first * step, low + last * step + 1, step))
    out[tuple(target)] = x[tuple(source)]
    return out


def flipped(weight: Tensor) -> Tensor:
    """A canonical weight as the convolution of :func:`as_convolution` wants it."""
    return weight.flip(tuple(range(2, weight.ndim)))


def placed(weight: Tensor, shape: OperatorShape) -> Tensor:
    """A canonical weight in PyTorch's order where the operator is a transposed convolution; else as it is."""
    return native(weight, shape.groups) if shape.kind == "conv_transpose" else weight
