"""Blocks in which norms, activations and residual additions run in the same passes as the operators between them.

The backend of an operator does so where it has the methods for it (:class:`modiff.kernels.backend.Backend`). The blocks
are those of diffusers, known by the names of their classes and of what they hold; whatever looks different runs as it
is. A fused block computes the same as its own ``forward``, up to rounding, in the evaluations in which all of its
operators advance, or quantize plainly; the first one of a trajectory, evaluations outside of any, refreshes, and
whatever is unusual run in that ``forward``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from modiff.kernels.backend import BACKENDS, Backend
from modiff.kernels.fused import After, Before
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.trajectory.cache import OperatorCache
from modiff.trajectory.graphs import outside
from modiff.trajectory.session import Listener, ModulationState

NOTHING = Before()
KEPT = After(dtype=None)
"""The result is read from ô itself; of plain quantization it is float32."""


class Fused:
    """Stands for the ``forward`` of a block.

    A copy or pickle of the block gets its own forward back.

    Args:
        module: The block.
        fusion: Says whether the fused form may run.
    """

    fuses: dict[str, str] = {}
    """What runs in the passes of which operator: parts of a sentence for ``describe``, by its name in the block. Those
    that begin with "before" are left out where the backend does not do what follows."""

    @classmethod
    def fused_operators(cls, module: Any) -> dict[str, str]:
        """:attr:`fuses` of one block."""
        return cls.fuses

    def __init__(self, module: Any, fusion: Fusion) -> None:
        self.module = module
        self.fusion = fusion
        self.eager: Callable[..., Any] = types.MethodType(type(module).forward, module)
        self.fused_calls = 0
        self.operators: list[QuantizedOperator] = [module.get_submodule(name) for name in self.fused_operators(module)]

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        """Why a block of the right class is not fused; None where it is."""
        raise NotImplementedError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The fused form."""
        raise NotImplementedError

    def fits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether the fused form is meant for these arguments."""
        raise NotImplementedError

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        if torch.compiler.is_compiling():
            return outside(self, x, *args, **kwargs)
        if (
            self.fusion.ready
            and not torch.is_grad_enabled()
            and self.fits(x, *args, **kwargs)
            and all(self.fusion.advances(operator, x.dtype) for operator in self.operators)
        ):
            self.fused_calls += 1
            return self.run(x, *args, **kwargs)
        return self.eager(x, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return types.MethodType, (type(self.module).forward, self.module)


class Fusion(Listener):
    """The fused blocks of a student.

    Args:
        student: What is searched for blocks.
        kind_of: Gives the class of :class:`Fused` that a block of diffusers may be; None: it is none of them.
    """

    def __init__(self, student: nn.Module, kind_of: Callable[[Any], type[Fused] | None]) -> None:
        self.ready = False
        self.modules: list[nn.Module] = []
        self.obstacles: dict[str, str] = {}
        for name, module in student.named_modules():
            kind = kind_of(module) if type(module).__module__.startswith("diffusers.") else None
            if kind is None:
                continue
            reason = _common_obstacle(module, kind) or kind.obstacle(module)
            if reason is not None:
                self.obstacles[name] = reason
                continue
            module.forward = kind(module, self)
            self.modules.append(module)
            for inner, sentence in kind.fused_operators(module).items():
                operator = module.get_submodule(inner)
                parts = [part for part in sentence.split(", ") if _does(_backend_of(operator), part)]
                operator.fused = ", ".join(parts)

    @override
    def before_evaluation(self, state: ModulationState, arguments: Sequence[Tensor]) -> None:
        """Fused forms run after the first evaluation of a trajectory."""
        self.ready = state.trajectory is not None and state.trajectory.current.total > 0

    @override
    def closed(self, state: ModulationState) -> None:
        """Nothing runs fused outside of a trajectory."""
        self.ready = False

    @override
    def moved(self, state: ModulationState) -> None:
        """An evaluation that had begun goes on unfused."""
        self.ready = False

    @override
    def removed(self, state: ModulationState) -> None:
        """Put the blocks' own forwards back; accelerate's offloading, which came after, stays around them."""
        for module in self.modules:
            inner = vars(module).get("_old_forward")
            if isinstance(inner, Fused):
                module._old_forward = inner.eager  # type: ignore[assignment]
            else:
                vars(module).pop("forward", None)
            for operator in module.modules():
                if isinstance(operator, QuantizedOperator):
                    operator.fused = ""

    def advances(self, operator: QuantizedOperator, dtype: torch.dtype) -> bool:
        """Whether an operator's next call quantizes its input, on a backend that fuses, unobserved by hooks.

        A modulated one advances its state, too.

        Args:
            operator: Of a block.
            dtype: In which the block's input comes.
        """
        execution = operator.region.execution
        if execution is None or dtype not in getattr(execution.backend, "fused_inputs", ()):
            return False
        if operator._forward_hooks or operator._forward_pre_hooks or operator.in_float:
            return False
        if isinstance(operator, ModulatedOperator):
            return _peek(operator) is not None and (operator.traced or not operator.refreshes())
        return hasattr(execution.backend, "apply") and operator.undecided is None


def call(operator: QuantizedOperator, x: Tensor, before: Before = NOTHING, after: After = KEPT) -> Tensor:
    """One evaluation of an operator with what stands before and after it.

    Args:
        operator: Its input is quantized in this call (:meth:`Fusion.advances`).
        x: Float32 or bfloat16, in the shape of its input.
        before: Makes its input from ``x``.
        after: Makes the result from ô.

    Returns:
        The result; ô itself, which the caller may only read, where ``after`` asks for none.
    """
    like = before.input(x)
    execution = operator.region.execution
    assert execution is not None
    backend: Any = execution.backend
    quantizer = execution.quantizer.at(operator.fixed_scale(like))
    if not isinstance(operator, ModulatedOperator):
        after = After() if after.dtype is None else after
        prepared = operator.prepared(execution)
        out, probe = backend.apply(x, prepared, quantizer, operator.float_bias(), before, after)
        operator.note(probe, quantized=True)
        return out
    cache = _next_cache(operator, like)
    after = _readable(after, cache, x, backend)
    prepared = operator.prepared(execution)
    out, probe = backend.advance_fused(x, cache.held, prepared, quantizer, cache.o_hat, before, after)
    operator.note(probe, quantized=True)
    return cache.o_hat if after.dtype is None else out


def call_together(operators: Sequence[QuantizedOperator], x: Tensor, before: Before, after: After) -> list[Tensor]:
    """Several Linears that read the same tensor; where all make the same codes of it, the first one's serve all."""
    if not _share_codes(operators):
        return [call(operator, x, before, after) for operator in operators]
    execution = operators[0].region.execution
    assert execution is not None
    backend: Any = execution.backend
    found, encoded = [], None
    for operator in operators:
        cache = _next_cache(operator, x) if isinstance(operator, ModulatedOperator) else None
        if encoded is None:
            encoded = backend.encode_fused(x, None if cache is None else cache.held, execution.quantizer, before)
        execution = operator.region.execution
        assert execution is not None
        prepared, o_hat = operator.prepared(execution), None if cache is None else cache.o_hat
        bias = operator.float_bias() if cache is None else None
        mine = (After() if after.dtype is None else after) if cache is None else _readable(after, cache, x, backend)
        out = backend.multiply_fused(prepared, encoded, o_hat, bias, mine)
        operator.note(encoded.probe, quantized=True)
        found.append(o_hat if mine.dtype is None and o_hat is not None else out)
    return found


def _share_codes(operators: Sequence[QuantizedOperator]) -> bool:
    """Whether operators of the same tensor make the same codes: they share â, or are plain and quantize alike."""
    first, *others = operators
    if not all(isinstance(operator, ModulatedOperator) for operator in operators):
        spec = first.activation_spec
        return not any(
            isinstance(o, ModulatedOperator) or o.calibrated is not None or o.activation_spec != spec for o in operators
        )
    leader, *caches = [_peek(operator) for operator in operators]
    return not any(cache is None or cache.leader is not leader for cache in caches)


def _next_cache(operator: ModulatedOperator, x: Tensor) -> OperatorCache:
    """The state of this call, laid out as rows of channels from the first fused call on."""
    if operator.traced:
        _, cache = operator.next_call(x)
    else:
        found = operator.state.next_cache(operator.name, x, operator.shape.is_batched(x.ndim))
        assert found is not None
        cache = found
        operator.check_lent(cache)
        cache.source = cache.lent = None
    image = operator.shape.kind == "conv" and x.ndim == 4
    layout = torch.channels_last if image else torch.contiguous_format
    cache.held.a_hat = cache.held.a_hat.contiguous(memory_format=layout)
    cache.o_hat = cache.o_hat.contiguous(memory_format=layout)
    return cache


def _peek(operator: QuantizedOperator) -> OperatorCache | None:
    """The state that the next call advances; None where it does something else. A graph finds it in its region."""
    if not operator.traced:
        return operator.state.peek_cache(operator.name)
    region, call = operator.region, operator.region.call
    return region.caches[call] if call < len(region.caches) and not region.reuses[call] else None


def _readable(after: After, cache: OperatorCache, x: Tensor, backend: Any) -> After:
    """What follows, with a copy of ô in float32 where ô itself was to be read and is in another dtype."""
    dtypes = (torch.float32, x.dtype) if getattr(backend, "returns_state", False) else (torch.float32,)
    return After() if after.dtype is None and cache.o_hat.dtype not in dtypes else after


def _does(backend: Any, part: str) -> bool:
    """Whether a backend does a part of what is fused, as ``describe`` words it."""
    return backend.fuses_after or not (part.startswith("before") or "GEGLU" in part)


def _backend_of(operator: QuantizedOperator) -> Any:
    """The backend that an operator gets where it is now."""
    return BACKENDS[operator.choice(operator.module.weight.device).name]


def fuses(backend: Backend) -> bool:
    """Whether a backend takes norms and activations into its passes."""
    return bool(getattr(backend, "fused_inputs", ()))


def _common_obstacle(module: Any, kind: type[Fused]) -> str | None:
    for name in kind.fused_operators(module):
        try:
            operator = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        if not isinstance(operator, QuantizedOperator) or operator.activation_spec is None:
            return f"the input of {name} is not quantized"
        if operator.modulation is not None and not operator.modulation.error_compensation:
            return f"{name} is modulated without error compensation"
        if not fuses(_backend_of(operator)):
            return f"{name} runs on {operator.choice(operator.module.weight.device)}"
    if "forward" in vars(module) or "_hf_hook" in vars(module):
        return "its forward was replaced"
    return None


def plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, unhooked."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)


def group_norm(norm: Any, activation: str | None, shift: Tensor | None = None) -> Before:
    """A :class:`torch.nn.GroupNorm` and what follows it."""
    return Before("group", activation, norm.num_groups, _float(norm.weight), _float(norm.bias), shift, norm.eps)


def layer_norm(norm: Any, scale: Tensor | None = None, shift: Tensor | None = None) -> Before:
    """A :class:`torch.nn.LayerNorm`, times ``1 + scale``, plus ``shift`` (each ``[B, C]``)."""
    mul, add = _float(norm.weight), _float(norm.bias)
    if scale is not None and shift is not None:
        factor = 1 + scale.float()
        add = shift.float() if add is None else torch.addcmul(shift.float(), factor, add)
        mul = factor if mul is None else factor * mul
        mul, add = mul.contiguous(), add.contiguous()
    return Before("layer", None, 1, mul, add, None, norm.eps)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()


def attend(module: Any, projected: Sequence[Tensor]) -> Tensor:
    """Softmax attention of queries ``[B, T, C]``, keys and values ``[B, S, C]``; returns ``[B, T, C]``."""
    batch, length, channels = projected[0].shape
    query, key, value = (x.view(batch, -1, module.heads, channels // module.heads).transpose(1, 2) for x in projected)
    found = F.scaled_dot_product_attention(query, key, value)
    return found.transpose(1, 2).reshape(batch, length, channels)


def kept_dtype(x: Tensor) -> After:
    """ô itself in float32 or where it has the dtype of the network around, else a copy in that dtype."""
    return KEPT if x.dtype == torch.float32 else After(dtype=x.dtype, lends=True)
