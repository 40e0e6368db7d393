"""The modulated operator: equations (8), (9), (13) and (14) of METHOD.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.config import Modulation
from modiff.kernels.simulate import fake_quantize_
from modiff.layers.caches import InputIdentity, OperatorCache
from modiff.layers.quantized import QuantizedOperator, compute_input, output_dtype
from modiff.layers.state import dense_like


class ModulatedOperator(QuantizedOperator):
    """A Linear or Conv that quantizes the change of its input and holds ``ô = A(â) + bias`` (the invariant).

    Args:
        modulation: Warm-up, error compensation, refreshes, dtype of ô.
        *args: As for :class:`QuantizedOperator`; the activation spec is not None.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, modulation: Modulation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modulation = modulation

    def forward(self, x: Tensor) -> Tensor:
        """One evaluation: warm up, refresh, or advance by the quantized difference."""
        self.check(x)
        self.require_range()
        out_dtype = output_dtype(x)
        cache = self.state.next_cache(self.name, x, self.adapter.is_batched(self.module, x.ndim))
        if cache is not None and cache.source is not None:
            if cache.source.matches(x):
                return self.unchanged(x, cache).to(out_dtype)
            cache.source = None
        a = compute_input(x)
        if cache is None:
            cache = self.allocate(a)
            refines = self.modulation.warmup == "refine"
            output = self.refine(a, cache) if refines else self.full(a, cache)
            exact = not refines
        elif self.refreshes():
            output, exact = self.full(a, cache), True
        else:
            output, exact = self.advance(a, cache), not self.modulation.error_compensation
        if exact:
            cache.source = InputIdentity.of(x)
        return output.to(out_dtype)

    def refreshes(self) -> bool:
        """Whether this evaluation is a full-precision refresh."""
        every, run = self.modulation.refresh_every, self.state.trajectory
        return every is not None and run is not None and run.current.total % every == 0

    def unchanged(self, x: Tensor, cache: OperatorCache) -> Tensor:
        """The input is the very tensor that â holds, so the residual is 0 and ô stays: no product (trap 10)."""
        self.state.note_unchanged(self.name, x, cache, quantized=not self.refreshes())
        return cache.o_hat.to(torch.promote_types(x.dtype, torch.float32), copy=True)

    def quantizer_input(self, x: Tensor) -> Tensor | None:
        """What the next call with ``x`` will quantize with a calibrated range; None where it will quantize nothing.

        That is the residual ``a - â``; None in warm-ups, refreshes, and where the input is unchanged.
        """
        run = self.state.trajectory
        if run is None or run.current.total == 0 or self.refreshes():
            return None
        cache = self.state.peek_cache(self.name)
        if cache is None or cache.a_hat.shape != x.shape or (cache.source is not None and cache.source.matches(x)):
            return None
        return compute_input(x) - cache.a_hat

    def allocate(self, a: Tensor) -> OperatorCache:
        """Memory for this call's state; ô is allocated when its shape is known."""
        cache = OperatorCache(dense_like(a, a.dtype), torch.empty(0))
        self.state.keep_cache(self.name, cache)
        return cache

    def full(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Full-precision activations: â = a (equation 8), ô = A(a) + bias (equation 9)."""
        cache.a_hat.copy_(a)
        self.state.note(self.name, a.sum(), quantized=False)
        return self.put(self.product(a, with_bias=True), cache)

    def refine(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Integer warm-up: â_1 = Q(a), then each round adds Q(a - â) with a scale of its own; never clipped."""
        assert self.activation_spec is not None
        output: Tensor | None = None
        for _ in range(self.modulation.warmup_rounds):
            residual = self.state.scratch(cache.a_hat)
            if output is None:
                residual.copy_(a)
            else:
                torch.sub(a, cache.a_hat, out=residual)
            low, high = fake_quantize_(residual, self.partition(a.ndim), self.activation_spec, clip=1.0)
            if output is None:
                self.state.note(self.name, (high - low).sum(), quantized=True)
                cache.a_hat.copy_(residual)
                output = self.product(residual, with_bias=True)
            else:
                cache.a_hat.add_(residual)
                output = output.add_(self.product(residual, with_bias=False))
        assert output is not None
        return self.put(output, cache)

    def advance(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Equations (13) and (14): â += Q(a - â), ô += A(Q(a - â))."""
        residual = torch.sub(a, cache.a_hat, out=self.state.scratch(cache.a_hat))
        self.state.note(self.name, self.quantize_(residual), quantized=True)
        if self.modulation.error_compensation:
            cache.a_hat.add_(residual)
        else:
            cache.a_hat.copy_(a)
        return self.put(self.product(residual, with_bias=False).add_(cache.o_hat), cache)

    def put(self, output: Tensor, cache: OperatorCache) -> Tensor:
        """Keep ô in its dtype. The caller gets a tensor of its own, which it may overwrite."""
        if cache.o_hat.shape != output.shape:
            dtype = self.modulation.state_dtype
            cache.o_hat = dense_like(output, output.dtype if dtype is None else getattr(torch, dtype))
        cache.o_hat.copy_(output)
        return output
