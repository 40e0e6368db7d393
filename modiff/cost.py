"""What a student costs: bit operations, weight bytes, state bytes. The warm-up and refreshes are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from modiff.config import Modulation
from modiff.errors import ConfigError
from modiff.layers.modulated import ModulatedOperator
from modiff.layers.operators import OperatorAdapter, find_adapter
from modiff.layers.quantized import QuantizedOperator
from modiff.layers.slots import slots
from modiff.layers.state import ATTRIBUTE, state_of, trajectory


@dataclass(frozen=True)
class OperatorCost:
    """Cost of one operator.

    Args:
        name: Qualified name.
        macs: Multiply-accumulates per image and evaluation.
        weight_bits: Width of its weight codes, or of its weight's dtype.
        activation_bits: Width of its input codes, or of its weight's dtype.
        bops: Bit operations per image and evaluation (MACs x weight bits x activation bits), warm-up averaged in.
        state_bytes: â and ô, per image.
        constant: Its input was fixed throughout the last trajectory before: its product is counted once.
    """

    name: str
    macs: float
    weight_bits: int
    activation_bits: int
    bops: float
    state_bytes: float
    constant: bool = False


@dataclass(frozen=True)
class Cost:
    """Cost of a denoiser. A GBOP is 1e9 bit operations, a MiB 2^20 bytes.

    Args:
        operators: One row each.
        other_macs: Multiply-accumulates outside the operators per image and evaluation, at full precision: products of
            two activations (attention), modules without an adapter.
        evaluations: Length of the trajectory over which the warm-up is averaged.
        gbops_per_evaluation: Bit operations per image, those of ``other_macs`` included.
        weight_mib: Weights with quantized ones packed at their width, scales included.
        state_mib_per_image: â and ô as allocated.
    """

    operators: tuple[OperatorCost, ...]
    other_macs: float
    evaluations: int
    gbops_per_evaluation: float
    weight_mib: float
    state_mib_per_image: float

    def __str__(self) -> str:
        return (
            f"{self.gbops_per_evaluation:.2f} GBOPs per image and evaluation (mean of {self.evaluations}), "
            f"{self.weight_mib:.2f} MiB of weights, {self.state_mib_per_image:.2f} MiB of state per image"
        )


def cost(model: nn.Module, *args: Any, evaluations: int = 50, **kwargs: Any) -> Cost:
    """Measure a student, or a full-precision teacher, by running one evaluation.

    Operators whose input was fixed throughout the student's last trajectory (keys and values of a prompt) are counted
    once per trajectory; before any trajectory none is known.

    Args:
        model: Student or teacher.
        *args: As for the denoiser's forward; dim 0 of the first tensor is the batch.
        evaluations: Denoiser calls per trajectory.
        **kwargs: Likewise.

    Raises:
        ConfigError: ``evaluations`` is below 1 or no argument is a tensor with a batch.
        TrajectoryError: A trajectory is open on the student.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ConfigError(f"evaluations is {evaluations}; allowed are whole numbers, 1 or more.")
    images = next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim > 0), 0)
    if images == 0:
        raise ConfigError(
            "cost() got no tensor with a batch in dim 0. Give the arguments of the denoiser's forward: "
            "cost(student, x, t)."
        )
    found = _find(model)
    last = state_of(model).last if hasattr(model, ATTRIBUTE) else None
    constant = last.constant if last else frozenset()
    counter = _Counter()
    with ExitStack() as stack:
        run = stack.enter_context(trajectory(model)) if hasattr(model, ATTRIBUTE) else None
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter.watch(found))
        model(*args, **kwargs)
        state = {} if run is None else {n: sum(c.num_bytes for c in caches) for n, caches in run.caches.items()}
    if hasattr(model, ATTRIBUTE):
        state_of(model).last = last  # measuring is no trajectory of the user's
    rows = tuple(
        _row(name, module, macs / images, state.get(name, 0) / images, evaluations, name in constant)
        for name, (module, macs) in ((n, (m, counter.macs.get(n, 0))) for n, (m, _) in found.items())
    )
    bits = 8 * next((p.element_size() for p in model.parameters()), 4)
    other = counter.other_macs / images
    return Cost(
        operators=rows,
        other_macs=other,
        evaluations=evaluations,
        gbops_per_evaluation=(sum(r.bops for r in rows) + other * bits * bits) / 1e9,
        weight_mib=weight_bytes(model) / 2**20,
        state_mib_per_image=sum(r.state_bytes for r in rows) / 2**20,
    )


def weight_bytes(model: nn.Module) -> float:
    """Bytes of a model's parameters as :func:`modiff.save` stores them: codes packed, scales float32."""
    packed = {id(m.module): m.packed for m in model.modules() if isinstance(m, QuantizedOperator) and m.packed}
    # A parameter that is tied to a quantized weight is still there in full precision.
    full = {
        id(s.tensor): s.tensor
        for s in slots(model)
        if not s.buffer and not (s.key == "weight" and id(s.owner) in packed)
    }
    parts = [t for w in packed.values() for t in (w.codes, w.scale, w.zero_point) if t is not None]
    return float(sum(t.numel() * t.element_size() for t in (*full.values(), *parts)))


def warm_evaluations(modulation: Modulation | None, evaluations: int) -> tuple[int, int]:
    """Evaluations with full-precision activations, and products at low bits of the rest (refining rounds counted).

    >>> warm_evaluations(Modulation(), 50), warm_evaluations(Modulation(warmup="refine"), 50)
    ((1, 49), (0, 52))
    >>> warm_evaluations(Modulation(refresh_every=10), 50), warm_evaluations(None, 50)
    ((5, 45), (0, 50))
    """
    if modulation is None:
        return 0, evaluations
    every = modulation.refresh_every
    refreshes = (evaluations - 1) // every if every else 0
    if modulation.warmup == "refine":
        return refreshes, evaluations - refreshes - 1 + modulation.warmup_rounds
    return 1 + refreshes, evaluations - 1 - refreshes


def _row(name: str, module: Any, macs: float, state: float, evaluations: int, constant: bool) -> OperatorCost:
    original = module.module if isinstance(module, QuantizedOperator) else module
    full_bits = 8 * original.weight.element_size()
    weight_bits = activation_bits = full_bits
    modulation = None
    if isinstance(module, QuantizedOperator):
        weight_bits = module.weight_spec.bits if module.weight_spec else full_bits
        activation_bits = module.activation_spec.bits if module.activation_spec else full_bits
        modulation = module.modulation if isinstance(module, ModulatedOperator) else None
    # A fixed input is computed in the (full) warm-up, and neither advanced nor refreshed.
    full, low = (1, 0) if constant else warm_evaluations(modulation, evaluations)
    bops = macs * weight_bits * (full * full_bits + low * activation_bits) / evaluations
    return OperatorCost(name, macs, weight_bits, activation_bits, bops, state, constant)


def _find(model: nn.Module) -> dict[str, tuple[nn.Module, OperatorAdapter]]:
    found: dict[str, tuple[nn.Module, OperatorAdapter]] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedOperator):
            inside.add(id(module.module))
            found[name] = (module, module.adapter)
        elif id(module) not in inside:
            try:
                adapter = find_adapter(module)
            except ConfigError:
                continue
            if adapter is not None:
                found[name] = (module, adapter)
    return found


class _Counter:
    """Counts the multiply-accumulates of one evaluation: operators' from shapes, all others by PyTorch's counter."""

    def __init__(self) -> None:
        # PyTorch's registry lacks the attention of the CPU.
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        self._flops = FlopCounterMode(display=False, custom_mapping=attention)
        self._inside = 0
        self.macs: dict[str, int] = {}

    @property
    def other_macs(self) -> float:
        """What ran outside the operators; PyTorch counts two operations for each multiply-accumulate."""
        return (self._flops.get_total_flops() - self._inside) / 2

    @contextmanager
    def watch(self, found: dict[str, tuple[nn.Module, OperatorAdapter]]) -> Iterator[None]:
        """Count what runs inside; fused attention layers, which hide their products, are off."""
        handles = [handle for name, (module, adapter) in found.items() for handle in self._hook(name, module, adapter)]
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self._flops:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, module: nn.Module, adapter: OperatorAdapter) -> list[Any]:
        original = module.module if isinstance(module, QuantizedOperator) else module

        def before(_: nn.Module, __: Any) -> None:
            self._inside -= self._flops.get_total_flops()

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            self._inside += self._flops.get_total_flops()
            self.macs[name] = self.macs.get(name, 0) + adapter.macs(original, output)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
