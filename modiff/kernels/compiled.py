"""The element-wise work around another backend's products, compiled once for all operators and shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modiff.kernels import elementwise
from modiff.kernels.backend import Backend, Encoded, FixedScale, Held, OperatorShape, Prepared, Quantizer, output_scale
from modiff.kernels.elementwise import ElementwiseBackend
from modiff.kernels.scratch import is_dense, scratch
from modiff.quantizers.affine import Limits
from modiff.quantizers.held import Int16Grid
from modiff.quantizers.packing import PackedWeight

SMALL = 2**15
"""Elements below which calling a compiled function takes longer than the eager passes (measured on a CPU)."""
RECOMPILES = 64
"""Graphs that one function may have: dtypes, layouts, kinds of scales; PyTorch would fall back to eager after 8."""


class CompiledBackend(ElementwiseBackend):
    """Another backend with its element-wise work compiled; its products, and all that is small, as they are.

    Args:
        inner: The other backend.
    """

    def __init__(self, inner: ElementwiseBackend) -> None:
        self.inner = inner
        self.name, self.devices = inner.name, inner.devices

    def zero(self, quantizer: Quantizer) -> int | None:
        """The other backend's."""
        return self.inner.zero(quantizer)

    def obstacle(
        self, shape: OperatorShape, quantizer: Quantizer, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """The other backend's."""
        return self.inner.obstacle(shape, quantizer, device, dtype)

    def prepare(self, weight: PackedWeight, shape: OperatorShape) -> Prepared:
        """By the other backend."""
        return self.inner.prepare(weight, shape)

    def multiply(self, prepared: Prepared, encoded: Encoded) -> Tensor:
        """By the other backend."""
        return self.inner.multiply(prepared, encoded)

    def encode(self, a: Tensor, held: Held | None, quantizer: Quantizer) -> Encoded:
        """Compiled, where the elements that share a scale lie in rows; inside a graph, inlined into it."""
        rows = a.numel() >= SMALL and not self.inner.keeps_zero(quantizer)
        if rows and not torch.compiler.is_compiling():
            zero = self.inner.zero(quantizer)
            found = _encode_rows(a, held, quantizer, zero)
            if found is not None:
                codes, scale, probe = found
                return Encoded(codes, zero or 0, None if zero is None else scale, probe)
        return self.inner.encode(a, held, quantizer)

    def update(self, product: Tensor, encoded: Encoded, o_hat: Tensor) -> Tensor:
        """Compiled; inside a graph, inlined into it."""
        if torch.compiler.is_compiling() or product.numel() < SMALL:
            return self.inner.update(product, encoded, o_hat)
        scale = None if encoded.scale is None else output_scale(encoded.scale, product)
        product = elementwise.laid_out_like(product, o_hat)
        rows = 1 if scale is None else scale.numel()
        flat, held = rows_view(product, rows), rows_view(o_hat, rows)
        if flat is None or held is None:
            compiled_function(update_into)(product, o_hat, scale)
        else:
            compiled_function(update_into)(flat, held, None if scale is None else scale.reshape(rows, 1))
        return product


def compiled_backend(backend: Backend) -> Backend:
    """A backend with compiled element-wise work; one that does not leave it to this package stays as it is."""
    return CompiledBackend(backend) if isinstance(backend, ElementwiseBackend) else backend


def encode_into(
    out: Tensor,
    a: Tensor,
    a_hat: Tensor | None,
    grid: Int16Grid | None,
    limits: Limits,
    fixed: FixedScale | None,
    compensates: bool,
    zero: int | None,
) -> tuple[Tensor, Tensor]:
    """:func:`.elementwise.encode` of rows, with the codes or values written to ``out``; all are matrices."""
    held = None if a_hat is None else Held(a_hat, grid, compensates)
    codes, scale, probe = elementwise.encode(a, held, limits, None, fixed, zero, alone=True)
    out.copy_(codes)
    return scale, probe


def update_into(product: Tensor, o_hat: Tensor, scale: Tensor | None) -> None:
    """:func:`.elementwise.update`, which returns nothing: a graph would return a copy."""
    elementwise.update(product, o_hat, scale)


@functools.cache
def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled once for all students of the process."""
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True, "recompile_limit": RECOMPILES}
    return torch.compile(function, **options)


def rows_view(x: Tensor, rows: int) -> Tensor | None:
    """A dense tensor as a matrix in the order of its memory, each row one set of a scale; None if it is not dense so.

    Every layout then looks alike to a compiled function.

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


def _encode_rows(
    a: Tensor, held: Held | None, quantizer: Quantizer, zero: int | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """:func:`.elementwise.encode` on rows; None where the elements that share a scale do not lie in one."""
    partition = quantizer.partition
    if a.numel() == 0 or partition.group_dim is not None or partition.keep != tuple(range(len(partition.keep))):
        return None
    if partition.shared is not None or quantizer.limits.margin is not None:  # rows would have to know of more
        return None
    a_hat, grid = (None, None) if held is None else (held.a_hat, held.grid)
    if a_hat is None:
        a = a if is_dense(a) else a.contiguous()
    elif a.stride() != a_hat.stride():
        a = scratch(a_hat, a.dtype).copy_(a)
    out = scratch(a, a.dtype if zero is None else torch.uint8, 1)
    kept = partition.range_shape(a.shape)
    rows = kept.numel()
    views = [rows_view(t, rows) for t in (out, a, a if a_hat is None else a_hat)]
    if any(view is None for view in views):
        return None
    fixed = quantizer.fixed
    flat = None if fixed is None else tuple(None if t is None else t.reshape(rows, 1) for t in fixed)
    numbers = None if a_hat is None else views[2]
    if grid is not None:  # compiled code does not vectorize int16 on the CPU; PyTorch's copies do
        assert numbers is not None
        numbers = scratch(numbers, a.dtype, 2).copy_(numbers)
    compensates = held is None or held.compensates
    scale, probe = compiled_function(encode_into)(
        views[0], views[1], numbers, grid, quantizer.limits, flat, compensates, zero
    )
    if grid is not None:
        views[2].copy_(numbers)  # type: ignore[union-attr, arg-type]
    return out, scale.reshape(kept), probe
