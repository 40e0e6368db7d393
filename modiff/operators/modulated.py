"""The modulated operator: equations (8), (9), (13) and (14) of METHOD.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.config.quant import Modulation
from modiff.errors import TrajectoryError
from modiff.kernels.stages import Int16Grid, advance, encode
from modiff.operators import execution
from modiff.operators.dtypes import compute_input, output_dtype
from modiff.operators.quantized import QuantizedOperator
from modiff.trajectory.cache import InputIdentity, OperatorCache, dense_like

VECTOR = 4096
"""Most channels of a vector whose state stays in float32: 16 KiB."""


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
        self.apart = False  # keeps an â of its own, also where another operator reads the same tensor

    def forward(self, x: Tensor) -> Tensor:
        """One evaluation: warm up, refresh, or advance by the quantized difference."""
        if torch.compiler.is_compiling():
            return self.traced(x)
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
            cache = self.allocate(a, x)
            refines = self.modulation.warmup == "refine"
            output = self.refine(a, cache) if refines else self.full(a, cache)
            exact = not refines
        elif self.refreshes():
            output, exact = self.full(a, cache), True
        else:
            output, exact = self.advance(a, x, cache), not self.modulation.error_compensation
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

        That is the residual ``a - â``; None in warm-ups, refreshes, and where the input is unchanged. Operators that
        share â advance it in the first one's call: ask only those that are set ``apart``.
        """
        run = self.state.trajectory
        if run is None or run.current.total == 0 or self.refreshes():
            return None
        cache = self.state.peek_cache(self.name)
        if cache is None or cache.a_hat.shape != x.shape or (cache.source is not None and cache.source.matches(x)):
            return None
        return compute_input(x) - cache.reconstruction()

    def allocate(self, a: Tensor, x: Tensor) -> OperatorCache:
        """Memory for this call's state; ô is allocated when its shape is known."""
        leader = self.state.find_leader(self, x) if self.shares else None
        if leader is not None:
            cache = OperatorCache(leader.a_hat, torch.empty(0), grid=leader.grid, leader=leader)
            leader.followers += 1
        elif self.modulation.reconstruction_dtype == "int16" and not (self.reads_vector(a) or self.widens):
            with torch.inference_mode(False):
                grid = Int16Grid.like(a)
            cache = OperatorCache(dense_like(a, torch.int16), torch.empty(0), grid=grid)
        else:
            cache = OperatorCache(dense_like(a, a.dtype), torch.empty(0))
        self.state.keep_cache(self.name, cache)
        return cache

    def reads_vector(self, a: Tensor) -> bool:
        """Whether each sample is one vector, of at most :data:`VECTOR` channels (a time embedding).

        Its state stays in float32: it takes few bytes, and its errors are the same at every place of an image, so they
        add up in the mean where those of pixels cancel out (benchmarks/state.md).
        """
        linear = self.adapter.kind == "linear"
        places, channels = (a.shape[1:-1], a.shape[-1]) if linear else (a.shape[2:], a.shape[1])
        batched = self.adapter.is_batched(self.module, a.ndim)
        return batched and a.ndim > 1 and places.numel() == 1 and channels <= VECTOR

    @property
    def widens(self) -> bool:
        """Whether the output has at least 16 times the input's channels: the input may be the image itself."""
        return 16 * self.channels[0] <= self.channels[1]

    @property
    def narrows(self) -> bool:
        """Whether the output has at most a sixteenth of the input's channels: it may be the denoiser's."""
        return self.channels[0] >= 16 * self.channels[1]

    @property
    def channels(self) -> tuple[int, int]:
        """Of input and output."""
        return self.weight_shape[1] * int(getattr(self.module, "groups", 1)), self.weight_shape[0]

    @property
    def shares(self) -> bool:
        """Whether others may share â: it must be a function of the input and the quantizer alone."""
        return self.modulation.warmup == "full" and self.calibrated is None and not self.apart

    def shares_with(self, other: ModulatedOperator) -> bool:
        """Whether the same inputs give both the same â and codes, evaluation after evaluation."""
        mine = (self.activation_spec, self.modulation, self.adapter, self.shares, self.backend)
        theirs = (other.activation_spec, other.modulation, other.adapter, other.shares, other.backend)
        device = self.module.weight.device
        return mine == theirs and self.choice(device).backend == other.choice(device).backend

    def full(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Full-precision activations: â = a (equation 8), ô = A(a) + bias (equation 9)."""
        self.code_offset(a)
        if cache.leader is None:
            cache.hold(a)
        self.state.note(self.name, a.sum(), quantized=False)
        held = a if cache.grid is None else cache.reconstruction()  # ô is made of what is kept (trap 9)
        output = self.product(held, with_bias=True)
        if self.region.offset is not None and output.ndim == 4 and self.adapter.kind == "conv":
            output = output.contiguous(memory_format=torch.channels_last)  # as integer products are
        return self.put(output, cache)

    def refine(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Integer warm-up: from â = 0, each round adds Q(a - â) with a scale of its own; never clipped."""
        cache.clear(a)
        offset, output = self.code_offset(a), None
        for _ in range(self.modulation.warmup_rounds):
            codes, scale, probe = execution.encode(self, a, cache, offset, clip=1.0)
            product = execution.multiply(self, codes, offset)
            product = product if offset is None else product.mul_(execution.output_scale(scale, product))
            if output is None:
                self.state.note(self.name, probe, quantized=True)
                output = self.add_bias(product)
            else:
                output = output.add_(product)
        assert output is not None
        return self.put(output, cache)

    def advance(self, a: Tensor, x: Tensor, cache: OperatorCache) -> Tensor:
        """Equations (13) and (14): â += Q(a - â), ô += A(Q(a - â))."""
        offset = self.code_offset(a)
        codes, scale, probe = self.advance_codes(a, x, cache, offset)
        self.state.note(self.name, probe, quantized=True)
        product = execution.multiply(self, codes, offset)
        return execution.accumulate(self, product, cache.o_hat, None if offset is None else scale)

    def advance_codes(
        self, a: Tensor, x: Tensor, cache: OperatorCache, offset: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Equation (13), by the first of those operators that share â; the others get its codes."""
        if cache.leader is not None:
            source, codes, scale = cache.leader.codes or (None, a, a)
            if source is None or not source.matches(x):
                raise TrajectoryError(
                    f"Operator {self.name!r} read the same tensor as another one in the first evaluation, and so "
                    "shares its state, but does not in this one. Give it a quantizer of its own by a rule, such as "
                    f"Rule({self.name!r}, modulation=Modulation(warmup='refine'))."
                )
            return codes, scale, scale.sum()
        fixed, compensates = self.calibrated_scale(a), self.modulation.error_compensation
        codes, scale, probe = execution.encode(self, a, cache, offset, fixed, compensates=compensates)
        if cache.followers:
            cache.codes = (InputIdentity.of(x), codes.clone(), scale)
            self.state.lead(cache)
        return codes, scale, probe

    def traced(self, x: Tensor) -> Tensor:
        """Equations (13) and (14) while ``torch.compile`` traces; see :meth:`QuantizedOperator.traced`."""
        self.check(x)
        region, call = self.region, self.region.call
        region.call = call + 1
        cache = region.caches[call]
        a = compute_input(x)
        if region.constant[call]:
            return cache.o_hat.to(a.dtype, copy=True).to(output_dtype(x))
        if cache.leader is not None and cache.leader.traced is not None:
            codes, scale = cache.leader.traced
        else:
            codes, scale = self.traced_codes(a, cache)
        product = execution.multiply(self, codes, region.offset)
        if region.offset is not None:
            product = product * execution.output_scale(scale, product)
        output = product + cache.o_hat.to(product.dtype)
        cache.o_hat.copy_(output)
        return output.to(output_dtype(x), copy=True)

    def traced_codes(self, a: Tensor, cache: OperatorCache) -> tuple[Tensor, Tensor]:
        """Equation (13) while ``torch.compile`` traces."""
        region, compensates = self.region, self.modulation.error_compensation
        limits = self.limits(a, None, region.fixed is not None)
        partition, fixed, offset = self.partition(a.ndim), region.fixed, region.offset
        codes, scale, _ = encode(
            a, cache.a_hat, cache.grid, limits, partition, fixed, compensates, offset, advances=not compensates
        )
        if compensates:
            advance(cache.a_hat, codes, scale, None if cache.grid is None else cache.grid.step, offset)
        if cache.followers:
            cache.traced = (codes, scale)
        return codes, scale

    def put(self, output: Tensor, cache: OperatorCache) -> Tensor:
        """Keep ô in its dtype. The caller gets a tensor of its own, which it may overwrite."""
        if cache.o_hat.shape != output.shape:
            dtype = None if self.reads_vector(cache.a_hat) or self.narrows else self.modulation.state_dtype
            cache.o_hat = dense_like(output, output.dtype if dtype is None else getattr(torch, dtype))
        cache.o_hat.copy_(output)
        return output
