"""How an operator runs its stages: eagerly in place, by compiled stages, or traced into a compiled denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modiff.kernels import stages
from modiff.kernels.simulate import encode_
from modiff.kernels.stages import Int16Grid, Limits
from modiff.trajectory.cache import OperatorCache

if TYPE_CHECKING:
    from modiff.operators.quantized import QuantizedOperator

Fixed = tuple[Tensor, Tensor | None]
SMALL = 2**15
"""Elements below which calling a compiled stage takes longer than the eager passes (measured on a CPU)."""


@dataclass(frozen=True)
class CompiledStages:
    """The two stages, compiled; :func:`modiff.compile` puts them into a student's state.

    Args:
        encode_into: :func:`encode_into`.
        accumulate: :func:`modiff.kernels.stages.accumulate`.
    """

    encode_into: Callable[..., tuple[Tensor, Tensor]]
    accumulate: Callable[..., None]


def encode_into(
    out: Tensor,
    a: Tensor,
    a_hat: Tensor | None,
    grid: Int16Grid | None,
    limits: Limits,
    fixed: Fixed | None,
    compensates: bool,
    offset: int | None,
) -> tuple[Tensor, Tensor]:
    """:func:`modiff.kernels.stages.encode` of rows, with the codes or values written to ``out``; all are matrices."""
    codes, scale, probe = stages.encode(a, a_hat, grid, limits, None, fixed, compensates, offset)
    out.copy_(codes)
    return scale, probe


def encode(
    operator: QuantizedOperator,
    a: Tensor,
    cache: OperatorCache | None,
    offset: int | None,
    fixed: Fixed | None = None,
    clip: float | None = None,
    compensates: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, ``offset`` standing for 0) or, without an offset, values of ``a - â``; advances â.

    They lie in scratch memory, valid until the operator after the next one is called.

    Args:
        operator: Its quantizer and state.
        a: The input.
        cache: Holds â; None: ``a`` itself is quantized.
        offset: See above.
        fixed: Calibrated scale and zero point.
        clip: Overrides the quantizer's.
        compensates: False: ``â = a`` (ablation).

    Returns:
        Codes or values; the scale, broadcasting against ``a``; a scalar that is NaN or Inf where ``a`` holds either.
    """
    compiled = operator.state.stages
    if cache is None and torch.empty_like(a, device="meta").stride() != a.stride():
        a = a.contiguous()  # scratch memory has its strides
    if compiled is not None and a.numel() >= SMALL:
        found = _encode_compiled(compiled, operator, a, cache, offset, fixed, clip, compensates)
        if found is not None:
            return found
    spec, partition = operator.activation_spec, operator.partition(a.ndim)
    assert spec is not None
    if cache is not None and cache.grid is not None:
        limits = operator.limits(a, clip, fixed is not None)
        return stages.encode(a, cache.a_hat, cache.grid, limits, partition, fixed, compensates, offset)
    held = a if cache is None else cache.a_hat
    residual = operator.state.scratch(held)
    if cache is None:
        residual.copy_(a)
    else:
        torch.sub(a, cache.a_hat, out=residual)
    scale, probe = encode_(residual, partition, spec, clip, fixed)
    if offset is None:
        residual.mul_(scale)
        if cache is not None:
            cache.a_hat.add_(residual) if compensates else cache.a_hat.copy_(a)
        return residual, scale, probe
    if cache is not None:
        cache.a_hat.addcmul_(residual, scale) if compensates else cache.a_hat.copy_(a)
    codes = operator.state.scratch(held, torch.uint8)
    codes.copy_(residual.add_(offset))
    return codes, scale, probe


def multiply(operator: QuantizedOperator, codes: Tensor, offset: int | None) -> Tensor:
    """``A`` of codes (without their scale) or of values; a tensor of its own."""
    if offset is None:
        return operator.product(codes, with_bias=False)
    assert operator.integer is not None
    return operator.integer(codes)


def accumulate(operator: QuantizedOperator, product: Tensor, o_hat: Tensor, scale: Tensor | None) -> Tensor:
    """Equation (14): ``ô += scale * product``; returns the new ô, in the memory of the product."""
    compiled = operator.state.stages
    scale = None if scale is None else output_scale(scale, product)
    if product.stride() != o_hat.stride():
        product = torch.empty_like(o_hat, dtype=product.dtype).copy_(product)
    if compiled is None or product.numel() < SMALL:
        total = product.add_(o_hat) if scale is None else product.mul_(scale).add_(o_hat)
        o_hat.copy_(total)
        return total
    rows = 1 if scale is None else scale.numel()
    flat, held = rows_view(product, rows), rows_view(o_hat, rows)
    if flat is None or held is None:
        compiled.accumulate(product, o_hat, scale)
    else:
        compiled.accumulate(flat, held, None if scale is None else scale.reshape(rows, 1))
    return product


def output_scale(scale: Tensor, product: Tensor) -> Tensor:
    """The scale of an input, to be broadcast against the output: one number for all, for each sample, or each token."""
    return scale.reshape(()) if scale.numel() == 1 and product.ndim != scale.ndim else scale


def rows_view(x: Tensor, rows: int) -> Tensor | None:
    """A dense tensor as a matrix in the order of its memory, each row one set of a scale; None if it is not dense so.

    Every layout then looks alike to a compiled stage.

    >>> rows_view(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), rows=2).shape
    torch.Size([2, 48])
    """
    # Detached: a graph would otherwise ask for the shape of the tensor that is viewed, too.
    if x.is_contiguous():
        return x.view(rows, -1).detach()
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: (-strides[d], d))
    leading = order[0] == 0 or rows == 1
    ordered = x.permute(order)
    fits = leading and ordered.is_contiguous() and rows in (1, x.shape[0])
    return ordered.view(rows, -1).detach() if fits else None


def _encode_compiled(
    compiled: CompiledStages,
    operator: QuantizedOperator,
    a: Tensor,
    cache: OperatorCache | None,
    offset: int | None,
    fixed: Fixed | None,
    clip: float | None,
    compensates: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`encode` on rows; None where the elements that share a scale do not lie in one."""
    partition = operator.partition(a.ndim)
    if a.numel() == 0 or partition.group_dim is not None or partition.keep != tuple(range(len(partition.keep))):
        return None
    a_hat, grid = (None, None) if cache is None else (cache.a_hat, cache.grid)
    if a_hat is not None and a.stride() != a_hat.stride():
        a = operator.state.scratch(a_hat, a.dtype).copy_(a)
    out = operator.state.scratch(a, a.dtype if offset is None else torch.uint8, 1)
    kept = partition.range_shape(a.shape)
    rows = kept.numel()
    views = [rows_view(t, rows) for t in (out, a, a if a_hat is None else a_hat)]
    if any(view is None for view in views):
        return None
    limits = operator.limits(a, clip, fixed is not None)
    flat = None if fixed is None else tuple(None if t is None else t.reshape(rows, 1) for t in fixed)
    held = None if a_hat is None else views[2]
    if grid is not None:  # compiled code does not vectorize int16 on the CPU; PyTorch's copies do
        assert held is not None
        held = operator.state.scratch(held, a.dtype, 2).copy_(held)
    scale, probe = compiled.encode_into(views[0], views[1], held, grid, limits, flat, compensates, offset)
    if grid is not None:
        views[2].copy_(held)  # type: ignore[union-attr, arg-type]
    return out, scale.reshape(kept), probe
