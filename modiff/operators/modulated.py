"""The modulated operator: equations (8), (9), (13) and (14) of docs/method.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.config.specs import Modulation
from modiff.errors import TrajectoryError
from modiff.kernels.backend import Backend, Encoded
from modiff.kernels.elementwise import laid_out_like, rescale
from modiff.operators.dtypes import compute_input, output_dtype
from modiff.operators.execution import Execution
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.vectors import is_vector
from modiff.quantizers.held import Held, Int16Grid
from modiff.trajectory.cache import OperatorCache, dense_like, static_room
from modiff.trajectory.graphs import outside
from modiff.trajectory.identity import InputIdentity
from modiff.trajectory.lending import Lent
from modiff.trajectory.schedule import Answer


class ModulatedOperator(QuantizedOperator):
    """A Linear or Conv that quantizes the change of its input and holds ``ô = A(â) + bias`` (the invariant).

    Args:
        modulation: Warm-up, error compensation, refreshes, dtype of ô.
        *args: As for :class:`QuantizedOperator`; the activation spec is not None.
        **kwargs: As for :class:`QuantizedOperator`.
    """

    modulation: Modulation
    apart = False  # keeps an â of its own, also where another operator reads the same tensor

    def __init__(self, *args: Any, modulation: Modulation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.modulation = modulation
        self.block = ""  # of a reuse schedule: what advances in other evaluations shares no â
        self.apart = False  # keeps an â of its own, also where another operator reads the same tensor
        self.held_dtype: torch.dtype | None = None  # of â as it was last allocated
        self.state.stateful = True

    def forget_executions(self) -> None:
        """Choose and prepare anew at the next call; another backend may keep â otherwise."""
        super().forget_executions()
        self.held_dtype = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in PyTorch's operators)
        """One evaluation: warm up, refresh, advance by the quantized difference, or give the last output again.

        The same code runs eagerly and while ``torch.compile`` traces; only who keeps the books differs: this operator,
        or :mod:`modiff.compiling.regions` outside the graph.
        """
        if self.is_traced_by_others():
            return outside(self.run_outside, input)
        x = input
        if self.in_float:
            return super().forward(x)
        self.check(x)
        answer, cache = self.next_call(x)
        if answer is Answer.REUSE:
            return self.reuse(x, cache).to(output_dtype(x))
        if answer is Answer.ADVANCE:
            self.check_lent(cache)
            output = self.advance(self.readable(x), x, cache)
        else:
            a = compute_input(x)
            cache = self.allocate(a, x) if cache is None else cache
            output = self.refine(a, cache) if answer is Answer.REFINE else self.full(a, cache)
        if not self.traced:
            exact = answer is Answer.COMPUTE or (answer is Answer.ADVANCE and not cache.held.compensates)
            cache.source = InputIdentity.of(x) if exact else None
        return self.give(output, cache, x)

    def readable(self, x: Tensor) -> Tensor:
        """The input as the backend takes it: some read half precision as it is."""
        reads_half = x.dtype != torch.float64 and getattr(self.execution(x).backend, "reads_half", False)
        return x if reads_half else compute_input(x)

    def check_lent(self, cache: OperatorCache) -> None:
        """See whether somebody wrote to what this operator returned in the last evaluation.

        Raises:
            TrajectoryError: It was ô itself, so that the state is lost.
        """
        if self.traced or cache.lent is None or not cache.lent.written:
            return
        if cache.lent.is_state:
            raise TrajectoryError(
                f"The output of operator {self.name!r} was overwritten in place, for the first time in evaluation "
                f"{self.state.evaluation - 1}, and it is the operator's state. Write to "
                f"a copy of it; or exclude the operator with Rule({self.name!r}, skip=True)."
            )
        cache.copies = True  # whoever reads the output writes to it

    def give(self, output: Tensor, cache: OperatorCache, x: Tensor) -> Tensor:
        """The output for the caller, in the dtype that the original would give.

        That is ô itself, without a copy, where the backend returned it and nobody was seen to write to an output.
        """
        dtype = output_dtype(x)
        if self.traced or not getattr(self.execution(x).backend, "returns_state", False):
            return output.to(dtype, copy=output is cache.o_hat)
        is_state = output is cache.o_hat
        lends = is_state and dtype == output.dtype and cache.lent is not None and not cache.copies
        given = output if lends else output.to(dtype, copy=is_state)
        if lends:
            self.state.lent.add(output.untyped_storage()._cdata)
        cache.lent = Lent.of(given, is_state=lends)
        return given

    def next_call(self, x: Tensor) -> tuple[Answer, OperatorCache]:
        """What this call does, and its cache (None in the first evaluation); a graph reads what was decided before."""
        if self.traced:
            region, call = self.region, self.region.call
            region.call = call + 1
            return Answer.REUSE if region.reuses[call] else Answer.ADVANCE, region.caches[call]
        self.require_range()
        cache = self.state.next_cache(self.name, x, self.shape.is_batched(x.ndim))
        answer = self.state.schedule.operator(self.state.evaluation, cache, x, self.modulation)
        return answer, cache  # type: ignore[return-value]

    def refreshes(self) -> bool:
        """Whether this evaluation is a full-precision refresh."""
        return self.state.schedule.refreshes(self.state.evaluation, self.modulation)

    def reuse(self, x: Tensor, cache: OperatorCache) -> Tensor:
        """The input is the very tensor that â holds, so the residual is 0 and ô stays: no product (trap 10)."""
        if not self.traced:
            self.state.note_unchanged(self.name, x, cache, quantized=not self.refreshes())
        return cache.o_hat.to(torch.promote_types(x.dtype, torch.float32), copy=True)

    def quantizer_input(self, x: Tensor) -> Tensor | None:
        """What the next call with ``x`` will quantize with a calibrated range; None where it will quantize nothing.

        That is the residual ``a - â``; None in warm-ups, refreshes, and where the input is unchanged. Operators that
        share â advance it in the first one's call: ask only those that are set ``apart``.
        """
        run = self.state.trajectory
        if run is None or self.state.evaluation == 0 or self.refreshes():
            return None
        cache = self.state.peek_cache(self.name)
        if cache is None or cache.shape != x.shape or (cache.source is not None and cache.source.matches(x)):
            return None
        return compute_input(x) - cache.reconstruction()

    def allocate(self, a: Tensor, x: Tensor) -> OperatorCache:
        """Memory for this call's state; ô is allocated when its shape is known."""
        shared = self.sharing_key(self.execution(a))
        leader = None if shared is None else self.state.find_leader(shared, x)
        assert self.state.trajectory is not None
        kept = static_room(self.state.static, self.state.trajectory.caches, self.name, a)
        held, o_hat = (self.room(a), torch.empty(0)) if kept is None else (kept.held, kept.o_hat)
        cache = OperatorCache(held if leader is None else leader.held, o_hat, a.shape, leader=leader)
        if leader is not None:
            leader.followers += 1
        elif shared is not None:
            self.state.may_lead(shared, x, cache)
        self.state.keep_cache(self.name, cache)
        self.held_dtype = cache.a_hat.dtype
        return cache

    def room(self, a: Tensor) -> Held:
        """Memory for â."""
        compensates, last = self.modulation.error_compensation, self._room_for_range(a)
        if not self.may_hold_int16(self.execution(a).backend) or self.reads_vector(a):
            return Held(dense_like(a, a.dtype), None, compensates, last)
        with torch.inference_mode(False):
            grid = Int16Grid.like(a)
        return Held(dense_like(a, torch.int16), grid, compensates, last)

    def may_hold_int16(self, backend: Backend) -> bool:
        """Whether â is int16 on a backend: as configured, else as the backend has it. Vectors are not."""
        kept = self.modulation.reconstruction_dtype or getattr(backend, "reconstruction_dtype", "float32")
        return kept == "int16" and not self.widens

    def _room_for_range(self, a: Tensor) -> Tensor | None:
        """Memory for the range of the last residual, where scales come from it."""
        if self.activation_spec is None or self.activation_spec.range != "previous":
            return None
        with torch.inference_mode(False):
            return a.new_zeros(3, *self.partition(a.ndim).range_shape(a.shape))

    def reads_vector(self, a: Tensor) -> bool:
        """Whether each sample is one vector; its state stays in float32."""
        return is_vector(a, self.shape.kind, self.shape.is_batched(a.ndim))

    @property
    def widens(self) -> bool:
        """Whether the output has at least 16 times the input's channels: the input may be the image itself."""
        return 16 * self.shape.in_channels <= self.shape.out_channels

    @property
    def narrows(self) -> bool:
        """Whether the output has at most a sixteenth of the input's channels: it may be the denoiser's."""
        return self.shape.in_channels >= 16 * self.shape.out_channels

    def sharing_key(self, execution: Execution) -> object | None:
        """Equal for operators whose â and codes of the same inputs are the same, evaluation after evaluation.

        None: â is not a function of the input and the quantizer alone, so that none may share it.
        """
        if self.modulation.warmup != "full" or self.calibrated is not None or self.apart:
            return None
        shape, backend = self.shape, execution.backend.name
        return self.block, self.activation_spec, self.modulation, shape.kind, len(shape.kernel), backend

    def full(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Full-precision activations: â = a (equation 8), ô = A(a) + bias (equation 9)."""
        prepared = self.execution(a).prepared
        if cache.leader is None:
            cache.held.hold(a)
        self.note(a.sum(), quantized=False)
        # ô is made of what is kept (trap 9), which may lie otherwise in memory that graphs hold: sums are in one order.
        held = a if cache.grid is None else laid_out_like(cache.reconstruction(), a)
        output = self.product(held, with_bias=True)
        if prepared is not None and prepared.layout is not None and output.ndim == 4:
            output = output.contiguous(memory_format=prepared.layout)  # as products are
        return self.put(output, cache)

    def refine(self, a: Tensor, cache: OperatorCache) -> Tensor:
        """Integer warm-up: from â = 0, each round adds Q(a - â) with a scale of its own; never clipped."""
        execution, output = self.execution(a), None
        cache.held.clear(a)
        for _ in range(self.modulation.warmup_rounds):
            encoded = execution.backend.encode(a, cache.held, execution.unclipped)
            product = rescale(execution.backend.multiply(self.prepared(execution), encoded), encoded)
            if output is None:
                self.note(encoded.probe, quantized=True)
                output = self.add_bias(product)
            else:
                output = output.add_(product)
        assert output is not None
        return self.put(output, cache)

    def advance(self, a: Tensor, x: Tensor, cache: OperatorCache) -> Tensor:
        """Equations (13) and (14): â += Q(a - â), ô += A(Q(a - â))."""
        execution = self.execution(a)
        backend, prepared = execution.backend, self.prepared(execution)
        if cache.leader is None and not cache.followers:
            quantizer = execution.quantizer.at(self.fixed_scale(a))
            output, probe = backend.advance(a, cache.held, prepared, quantizer, cache.o_hat)
        else:
            encoded = self.shared_codes(a, x, cache, execution)
            into = getattr(backend, "multiply_into", None)
            if into is None:
                output = backend.update(backend.multiply(prepared, encoded), encoded, cache.o_hat)
            else:
                output = into(prepared, encoded, cache.o_hat)
            probe = encoded.probe
        self.note(probe, quantized=True)
        return output

    def shared_codes(self, a: Tensor, x: Tensor, cache: OperatorCache, execution: Execution) -> Encoded:
        """Equation (13), by the first of those operators that share â; the others get its codes."""
        traced, leader = self.traced, cache.leader
        if leader is None:
            encoded = execution.backend.encode(a, cache.held, execution.quantizer)
            cache.encoded = encoded if traced else encoded.clone()  # another operator's codes may overwrite these
            if not traced:
                cache.encoded_from = InputIdentity.of(x)
                self.state.lead(cache)
            return encoded
        if not traced and (leader.encoded_from is None or not leader.encoded_from.matches(x)):
            raise TrajectoryError(
                f"Operator {self.name!r} read the same tensor as another one in the first evaluation, and so "
                "shares its state, but does not in this one. Give it a quantizer of its own by a rule, such as "
                f"Rule({self.name!r}, modulation=Modulation(warmup='refine'))."
            )
        shared: Encoded = leader.encoded
        return shared

    def put(self, output: Tensor, cache: OperatorCache) -> Tensor:
        """Keep ô in its dtype. The caller gets a tensor of its own, which it may overwrite."""
        if cache.o_hat.shape != output.shape:
            dtype = None if self.reads_vector(cache.a_hat) or self.narrows else self.modulation.state_dtype
            cache.o_hat = dense_like(output, output.dtype if dtype is None else getattr(torch, dtype))
        cache.o_hat.copy_(output)
        return output
