"""What a student costs: bit operations, weight bytes, state bytes. The warm-up and refreshes are counted."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.specs import Modulation
from modiff.errors import ConfigError
from modiff.operators.adapters import OperatorAdapter, find_adapter
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.student.products import ProductCounter
from modiff.student.reuse import reuse_of
from modiff.student.tensors import slots
from modiff.trajectory.session import ATTRIBUTE, Trajectory, require_module, state_of, trajectory


@dataclass(frozen=True)
class OperatorCost:
    """Cost of one operator.

    Args:
        name: Qualified name.
        macs: Multiply-accumulates per image and evaluation.
        weight_bits: Width of its weight codes; in full precision, of the dtype its product runs in.
        activation_bits: Width of its input codes; in full precision, likewise.
        bops: Bit operations per image and evaluation (MACs x weight bits x activation bits), warm-up averaged in.
        container_bops: The same at the bits that a product is given: 8 for codes that share a container with exponents
            (``scales="power_of_two"``), else those of the codes.
        state_bytes: â and ô as allocated, per image, of all contexts; memory that operators share counts for the first
            of them.
        weight_bytes: Its weight, scales, bias and calibrated range, as stored; tied ones count for the first.
        constant: Its input was constant throughout the last trajectory before: its product is counted once per context.
        uncalled: It was not called: its module is not used, or other code multiplies by its weight itself.
        quantized: Its weight or its input is.
    """

    name: str
    macs: float
    weight_bits: int
    activation_bits: int
    bops: float
    state_bytes: float
    weight_bytes: float
    constant: bool = False
    uncalled: bool = False
    quantized: bool = False
    container_bops: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of a denoiser. A GBOP is 1e9 bit operations, a MiB 2^20 bytes.

    Args:
        operators: One row each.
        other_macs: Multiply-accumulates outside the operators per image and evaluation: products of two activations
            (attention), modules without an adapter.
        other_bops: Their bit operations, at the precision of the very tensors that were multiplied.
        other_weight_bytes: Parameters outside the operators (norms, embeddings), as stored.
        evaluations: Length of the trajectory over which the warm-ups are averaged.
        contexts: Contexts of the trajectory, each with a warm-up and a state of its own.
        gbops_per_evaluation: Bit operations per image at the bits of the codes, ``other_bops`` included.
        container_gbops_per_evaluation: The same at the bits that products are given; see :class:`OperatorCost`.
        weight_mib: Weights with quantized ones packed at their width, scales included: the tensors of
            :func:`modiff.save` without buffers.
        state_mib_per_image: â and ô as allocated, of all contexts.
        peak_state_mib_per_image: State, and the int8 codes of the operator with the largest input: what a GPU holds at
            the same time on top of a teacher's activations, where ô is the operators' output without a copy.
        integer_share: Share of the operators' multiply-accumulates whose inputs are quantized.
    """

    operators: tuple[OperatorCost, ...]
    other_macs: float
    other_bops: float
    other_weight_bytes: float
    evaluations: int
    contexts: int
    gbops_per_evaluation: float
    weight_mib: float
    state_mib_per_image: float
    peak_state_mib_per_image: float
    container_gbops_per_evaluation: float
    integer_share: float = 0.0

    def __str__(self) -> str:
        container = ""
        if self.container_gbops_per_evaluation != self.gbops_per_evaluation:
            container = f" ({self.container_gbops_per_evaluation:.2f} at the 8 bits of containers)"
        text = (
            f"{self.gbops_per_evaluation:.2f} GBOPs{container} per image and evaluation (mean of {self.evaluations}), "
            f"{self.weight_mib:.2f} MiB of weights, {self.state_mib_per_image:.2f} MiB of state per image; "
            f"{self.full_precision_share:.1%} of the multiply-accumulates in full precision"
        )
        uncalled = sum(row.uncalled for row in self.operators)
        if uncalled:
            text += f"; {uncalled} of {len(self.operators)} operators {'were' if uncalled > 1 else 'was'} never called"
        return text

    @property
    def full_precision_share(self) -> float:
        """Share of the multiply-accumulates that quantize neither side: skipped modules, products in attention."""
        full = self.other_macs + sum(row.macs for row in self.operators if not row.quantized)
        whole = self.other_macs + sum(row.macs for row in self.operators)
        return full / whole if whole else 0.0


def cost(model: nn.Module, *args: Any, evaluations: int = 50, contexts: int | None = None, **kwargs: Any) -> Cost:
    """Measure a student, or a full-precision teacher, by running one evaluation.

    Operators whose input was constant throughout the student's last trajectory (keys and values of a prompt) are
    counted once per context; before any trajectory none is known.

    Args:
        model: Student or teacher.
        *args: As for the denoiser's forward; dim 0 of the first tensor is the batch.
        evaluations: Denoiser calls per trajectory, in all contexts.
        contexts: Contexts that share these calls evenly, such as 2 for guidance in two calls per step: each warms up,
            refreshes and holds a state of its own. None: as many as the student's last trajectory had, else 1.
        **kwargs: As for the denoiser's forward.

    Raises:
        ConfigError: ``evaluations`` is below 1, ``contexts`` is not from 1 to ``evaluations``, or no argument is a
            tensor with a batch.
        TrajectoryError: A trajectory is open on the student.
    """
    require_module(model)
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
    contexts = _number_of_contexts(contexts, last, evaluations)
    counter, state, branches = _count_one(model, found, args, kwargs)
    weights = stored_bytes(model)
    skipped = _skipped(model, evaluations, contexts)
    rows = []
    for name, (module, _) in found.items():
        macs, bits = counter.macs.get(name, 0) / images, counter.bits.get(name)
        times = skipped.get(counter.block_of.get(name, ""), 0)
        counted = _bit_operations(module, macs, bits, (evaluations, contexts), name in constant, times)
        held = contexts * state.get(name, 0) / images, weights.pop(name, 0.0)
        seen = {"constant": name in constant, "uncalled": name not in counter.macs, "quantized": _is_quantized(module)}
        rows.append(OperatorCost(name, macs, *counted[:3], *held, **seen, container_bops=counted[3]))
    shares = {block: 1 - count / evaluations for block, count in skipped.items()}
    other_macs, other_bops = (total / images for total in counter.others(shares))
    state_mib = (sum(r.state_bytes for r in rows) + contexts * branches / images) / 2**20
    return Cost(
        operators=tuple(rows),
        other_macs=other_macs,
        other_bops=other_bops,
        other_weight_bytes=sum(weights.values()),
        evaluations=evaluations,
        contexts=contexts,
        gbops_per_evaluation=(sum(r.bops for r in rows) + other_bops) / 1e9,
        weight_mib=(sum(r.weight_bytes for r in rows) + sum(weights.values())) / 2**20,
        state_mib_per_image=state_mib,
        peak_state_mib_per_image=state_mib + _widest(found, counter) / images / 2**20,
        integer_share=sum(r.macs for r in rows if _quantizes(found[r.name][0])) / max(1.0, sum(r.macs for r in rows)),
        container_gbops_per_evaluation=(sum(r.container_bops for r in rows) + other_bops) / 1e9,
    )


def _number_of_contexts(given: int | None, last: Trajectory | None, evaluations: int) -> int:
    """As given, else as many as the last trajectory had."""
    contexts = min(max(len(last.contexts), 1) if last else 1, evaluations) if given is None else given
    if isinstance(contexts, bool) or not isinstance(contexts, int) or not 1 <= contexts <= evaluations:
        raise ConfigError(f"contexts is {contexts}; allowed are whole numbers from 1 to evaluations ({evaluations}).")
    return contexts


def _widest(found: dict[str, tuple[nn.Module, OperatorAdapter]], counter: ProductCounter) -> int:
    """Elements of the largest input that is quantized."""
    quantized = (name for name, (module, _) in found.items() if getattr(module, "activation_spec", None) is not None)
    return max((counter.inputs.get(name, 0) for name in quantized), default=0)


def _quantizes(module: Any) -> bool:
    quantized = isinstance(module, QuantizedOperator) and not module.in_float
    return quantized and module.activation_spec is not None


def _count_one(
    model: nn.Module, found: dict[str, tuple[nn.Module, OperatorAdapter]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ProductCounter, dict[str, int], int]:
    """Run one evaluation: its products, the bytes of the state by operator, and those of kept branches."""
    counter = ProductCounter()
    reuse = reuse_of(state_of(model)) if hasattr(model, ATTRIBUTE) else None
    student = state_of(model) if hasattr(model, ATTRIBUTE) else None
    before = None if student is None else (student.last, student.called)
    with ExitStack() as stack:
        if student is not None:
            stack.enter_context(student.remarks.muted())  # measuring is no trajectory of the user's
        run = None if student is None else stack.enter_context(trajectory(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter.watch(found, {} if reuse is None else reuse.blocks))
        model(*args, **kwargs)
        state = {} if run is None else _state_bytes(run)
        branches = 0 if run is None else run.branch_bytes
    if reuse is not None and reuse.schedule.mode == "extrapolate":
        branches *= 2  # from the second evaluation on, two are kept
    if student is not None and before is not None:
        student.last, student.called = before
    return counter, state, branches


def _skipped(model: nn.Module, evaluations: int, contexts: int) -> dict[str, int]:
    """Evaluations of a trajectory, in all contexts, in which a static schedule skips a block, by block."""
    reuse = reuse_of(state_of(model)) if hasattr(model, ATTRIBUTE) else None
    if reuse is None:
        return {}
    lengths = [evaluations // contexts + (i < evaluations % contexts) for i in range(contexts)]
    return {
        name: sum(sum(reuse.schedule.skips(name, t) for t in range(length)) for length in lengths)
        for name in reuse.blocks
    }


def _is_quantized(module: nn.Module) -> bool:
    """Whether an operator quantizes its weight or its input."""
    return isinstance(module, QuantizedOperator) and (module.weight_spec or module.activation_spec) is not None


def weight_bytes(model: nn.Module) -> float:
    """Bytes of a model's parameters as :func:`modiff.save` stores them: codes packed, scales float32."""
    return sum(stored_bytes(model).values())


def stored_bytes(model: nn.Module) -> dict[str, float]:
    """The same by operator; everything outside of operators under ``""``."""
    found: dict[str, float] = {}
    owners = {}
    for name, (module, _) in _find(model).items():
        owners[id(module.module if isinstance(module, QuantizedOperator) else module)] = name
        if isinstance(module, QuantizedOperator):
            packed, ranges = module.packed, module.calibrated
            parts = [] if packed is None else [packed.codes, packed.scale, packed.zero_point, packed.shift]
            parts += [] if ranges is None else [ranges.scale, ranges.zero_point]
            found[name] = float(sum(_bytes(part) for part in parts if part is not None))
    packed_owners = {id(m.module) for m in model.modules() if isinstance(m, QuantizedOperator) and m.packed}
    seen: set[int] = set()
    for slot in slots(model):
        # A parameter that is tied to a quantized weight is still there in full precision.
        if slot.buffer or (slot.key == "weight" and id(slot.owner) in packed_owners) or id(slot.tensor) in seen:
            continue
        seen.add(id(slot.tensor))
        name = owners.get(id(slot.owner), "")
        found[name] = found.get(name, 0.0) + _bytes(slot.tensor)
    return found


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_bytes(run: Trajectory) -> dict[str, int]:
    """Bytes of the state as allocated, by operator."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, caches in run.caches.items():
        for tensor in (t for cache in caches for t in (cache.a_hat, cache.o_hat)):
            storage = tensor.untyped_storage()
            found[name] = found.get(name, 0) + (0 if storage._cdata in seen else storage.nbytes())
            seen.add(storage._cdata)
    return found


def warm_evaluations(modulation: Modulation | None, evaluations: int, contexts: int = 1) -> tuple[int, int]:
    """Evaluations with full-precision activations, and products at low bits of the rest (refining rounds counted).

    Each context has its own; the evaluations are shared evenly.

    >>> warm_evaluations(Modulation(), 50), warm_evaluations(Modulation(warmup="refine"), 50)
    ((1, 49), (0, 52))
    >>> warm_evaluations(Modulation(refresh_every=10), 50), warm_evaluations(None, 50)
    ((5, 45), (0, 50))
    >>> warm_evaluations(Modulation(), 100, contexts=2), warm_evaluations(Modulation(warmup="refine"), 100, contexts=2)
    ((2, 98), (0, 104))
    """
    if contexts > 1:
        lengths = [evaluations // contexts + (i < evaluations % contexts) for i in range(contexts)]
        full, low = zip(*(warm_evaluations(modulation, length) for length in lengths), strict=True)
        return sum(full), sum(low)
    if modulation is None:
        return 0, evaluations
    every = modulation.refresh_every
    refreshes = (evaluations - 1) // every if every else 0
    if modulation.warmup == "refine":
        return refreshes, evaluations - refreshes - 1 + modulation.warmup_rounds
    return 1 + refreshes, evaluations - 1 - refreshes


def _bit_operations(
    module: Any, macs: float, bits: int | None, length: tuple[int, int], constant: bool, skipped: int = 0
) -> tuple[int, int, float, float]:
    """Bits of both sides, and bit operations per evaluation, warm-up and refreshes averaged in.

    Args:
        module: An operator, quantized or not.
        macs: Its multiply-accumulates in one product.
        bits: Of the dtype in which a full-precision product of it was seen to run; None: it was not called.
        length: Evaluations of the trajectory, and its contexts.
        constant: Its input is constant.
        skipped: Evaluations in which a reuse schedule skips it; a refresh among them counts as an ordinary one.

    Returns:
        Both bits, the bit operations, and these with codes that share a container with exponents at its 8 bits.
    """
    evaluations, contexts = length
    if not isinstance(module, QuantizedOperator):
        bits = 8 * module.weight.element_size() if bits is None else bits
        bops = macs * bits * bits * (1 - skipped / evaluations)
        return bits, bits, bops, bops
    full = 8 * module.module.weight.element_size()
    weight_bits = module.weight_spec.bits if module.weight_spec else full
    quantizes = module.activation_spec is not None and not module.in_float
    activation_bits = module.activation_spec.bits if module.activation_spec and quantizes else full
    shares = quantizes and module.activation_spec is not None and module.activation_spec.scales == "power_of_two"
    modulation = module.modulation if isinstance(module, ModulatedOperator) and quantizes else None
    # A constant input is computed in the (full) warm-up, and neither advanced nor refreshed.
    at_full, at_low = (contexts, 0) if constant else warm_evaluations(modulation, evaluations, contexts)
    at_low = max(at_low - skipped, 0)
    bops, container = (
        macs * weight_bits * (at_full * full + at_low * bits) / evaluations
        for bits in (activation_bits, 8 if shares else activation_bits)
    )
    return weight_bits, activation_bits, bops, container


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
