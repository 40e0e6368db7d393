"""Swap a denoiser's linear operators for quantized ones, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from modiff.config.quant import QuantConfig, QuantSpec
from modiff.errors import ConfigError
from modiff.kernels.scratch import free_scratch
from modiff.operators.adapters import find_adapter
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.rewrites import rewrite, rewritten, undo
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.packing import PackedWeight
from modiff.student.blocks import prompt_modules, reusable_blocks
from modiff.student.describe import Description, Row
from modiff.student.guard import Guard
from modiff.student.match import UNDECIDED, Plan, plan, plans
from modiff.student.refusals import allow_methods, refuse_hooks, refuse_methods
from modiff.student.reuse import install_schedule, reuse_of
from modiff.student.share import FullPrecisionShare, is_left, macs_beforehand, share_of
from modiff.student.special import resolve
from modiff.student.tensors import Slot, slots
from modiff.trajectory.listeners import Listener
from modiff.trajectory.session import ATTRIBUTE, ModulationState, require_module, state_of

__all__ = ["RECORD", "Description", "Record", "Row", "convert", "describe", "operators", "plan", "quantize", "restore"]

RECORD = "_modiff_record"


@dataclass
class Record:
    """What :func:`quantize` or :func:`modiff.load` did, kept on the student.

    Args:
        config: The quantization.
        keep_teacher: The original weights are still there.
        description: One row for each operator.
        names: Every name of each quantized operator, by its first one.
        hooks: On the student itself.
        loaded: The student was loaded: nothing says that what the model held before was its teacher.
        replaced: Tensors of the model that loading replaced.
    """

    config: QuantConfig
    keep_teacher: bool
    description: Description
    names: dict[str, list[str]] = field(default_factory=dict)
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)
    loaded: bool = False
    replaced: list[tuple[Slot, torch.Tensor]] = field(default_factory=list)


def quantize(
    model: nn.Module, config: QuantConfig | str, keep_teacher: bool = True, example_inputs: Any = None
) -> nn.Module:
    """Swap the linear operators of a denoiser for quantized ones, in place.

    Args:
        model: Any module; its forward is one evaluation.
        config: What to quantize, and how; or a preset's name, such as ``w8a4-modiff``.
        keep_teacher: Keep the original weights, so that :func:`restore` works without the teacher.
        example_inputs: Arguments of the denoiser's forward, a tuple or a mapping of keywords: one evaluation shows
            which operators read one vector per sample, and which are the first and the last (``config.vectors`` and
            ``config.ends``). Not needed for diffusers' networks, which are known. Without it, vectors are recognized
            in the first evaluation, after weights are quantized; :func:`describe` calls them undecided until then.
            A large share of work that stays in full precision is then warned of in the first evaluation as well.

    Returns:
        The same module, now the student.

    Raises:
        ConfigError: The model is a pipeline, has no linear operators or is a student already, a rule's pattern matches
            nothing, a granularity does not exist for an operator, or a weight is no number; the model is unchanged.
    """
    require_module(model)
    config = QuantConfig.preset(config) if isinstance(config, str) else config
    _require_quantizable(model, config)
    config = resolve(model, config, example_inputs)
    # Rules may name halves of operators that are split later: then the first evaluation tells the shares.
    macs = {} if config.splits else macs_beforehand(model, plans(model, config), example_inputs)
    student = convert(model, config, keep_teacher)
    if macs:
        share_of(state_of(student)).settle(macs)
    return student


def convert(
    model: nn.Module,
    config: QuantConfig,
    keep_teacher: bool,
    weights: Mapping[str, PackedWeight] | None = None,
    ranges: Mapping[str, CalibratedRange] | None = None,
    divisors: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """:func:`quantize`, with what is known from a calibration.

    Args:
        model: As for :func:`quantize`.
        config: What to quantize, and how.
        keep_teacher: As for :func:`quantize`.
        weights: Quantized weight by operator; None: the model's are rounded to nearest.
        ranges: Calibrated ranges of activations by operator, as many as there are.
        divisors: Of the input channels of each smoothed operator.

    Raises:
        CalibrationError: A range is for another quantizer than the operator's.
        ConfigError: As for :func:`quantize`.
    """
    require_module(model)
    _require_quantizable(model, config)
    changed = rewrite(model, config, divisors)
    state = ModulationState()
    # Everything is built before anything is swapped: an error leaves the model as it was.
    try:
        found = plans(model, config)
        built = [(p, _build(p, state, weights, config)) for p in found if p.row.skipped is None]
        for planned, operator in built:
            _require_backend(operator, config.backend)
            operator.use_range((ranges or {}).get(planned.row.name))
        refuse_hooks(model, state.stateful or config.schedule is not None)
    except Exception:
        if changed:
            undo(model)
        raise
    if config.schedule is not None:
        reusable_blocks(model, config.schedule)  # refuses what matches nothing, before anything is swapped
    record = Record(config, keep_teacher, Description(tuple(p.row for p in found)))
    _swap(model, built, record)
    record.hooks = _watch(model, state, record.names)
    left = {planned.row.name: planned.module for planned in found if is_left(planned)}
    state.listeners.append(FullPrecisionShare({planned.row.name: operator for planned, operator in built}, left))
    if config.schedule is not None:
        record.hooks += install_schedule(model, config.schedule, state)
    setattr(model, ATTRIBUTE, state)
    setattr(model, RECORD, record)
    refuse_methods(model, state.stateful or config.schedule is not None)
    return model


def _require_quantizable(model: nn.Module, config: QuantConfig) -> None:
    """Refuse what is no configuration, and models that cannot become students.

    Raises:
        ConfigError: One of them.
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(
            f"config is {config!r}; give a QuantConfig or the name of a preset, for example 'w8a4-modiff'."
        )
    if hasattr(model, ATTRIBUTE) or any(isinstance(module, QuantizedOperator) for module in model.modules()):
        raise ConfigError("The model is a student already. Call modiff.restore(student) before quantizing it again.")
    if find_adapter(model) is not None:
        raise ConfigError(
            f"A bare {type(model).__name__} cannot be swapped in place. Wrap it: nn.Sequential(operator)."
        )


def _swap(model: nn.Module, built: list[tuple[Plan, QuantizedOperator]], record: Record) -> None:
    """Put the quantized operators in the places of the original ones, under all their names."""
    for planned, operator in built:
        record.names[planned.row.name] = planned.names
        for name in planned.names:
            model.set_submodule(name, operator)
        if not record.keep_teacher:
            operator.drop_original()
    for _, whole in rewritten(model) if not record.keep_teacher else ():
        whole.release()


def _watch(model: nn.Module, state: ModulationState, names: Iterable[str]) -> list[torch.utils.hooks.RemovableHandle]:
    """Tell the state where evaluations begin and end; let it keep the output of modules that carry a prompt."""
    hooks = [
        model.register_forward_pre_hook(state.begin_evaluation, with_kwargs=True),
        model.register_forward_hook(state.end_evaluation),
    ]
    state.listeners.append(_FreesScratch())
    state.listeners.append(Guard(model, list(names)))
    for name in prompt_modules(model, state.schedule):
        hook = functools.partial(state.keep_output, name)
        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    return hooks


def restore(student: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """Put the original operators back, in place; the teacher's outputs come back bit for bit.

    Args:
        student: What :func:`quantize` returned.
        teacher: Where the weights come from if the student was made with ``keep_teacher=False``, or loaded. Of a
            student loaded into its teacher, the student itself: the model is then as it was before.

    Returns:
        The same module, in full precision.

    Raises:
        ConfigError: The weights were not kept and no teacher is given, or the teacher is another architecture. The
            student is then unchanged.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state_of(student).refuse_inside("restored")
    if teacher is not None:
        require_module(teacher)
    record: Record = getattr(student, RECORD)
    if teacher is None and (record.loaded or not record.keep_teacher):
        why = "was loaded" if record.loaded else "was made with keep_teacher=False"
        raise ConfigError(f"The student {why}. Give the teacher: restore(student, teacher=...).")
    if teacher is student and not record.keep_teacher:
        raise ConfigError("The teacher is the student itself, whose weights were not kept. Give another copy of it.")
    own = teacher is None or teacher is student
    copies = [] if own else _tensors_of(teacher, student)  # type: ignore[arg-type]
    for name, names in record.names.items():
        original = student.get_submodule(name).module
        assert isinstance(original, nn.Module)
        for alias in names:
            student.set_submodule(alias, original)
    undo(student)
    for slot, old in record.replaced if own else []:
        slot.put(old)
    _copy(copies)
    for hook in record.hooks:
        hook.remove()
    state_of(student).tell("removed")
    allow_methods(student)
    delattr(student, ATTRIBUTE)
    delattr(student, RECORD)
    return student


def _tensors_of(teacher: nn.Module, student: nn.Module) -> list[tuple[Slot, torch.Tensor]]:
    """The teacher's tensor for each slot of the student."""
    advice = "Give the model that the student was made from; restore it first if it is a student too."
    first = next(iter(getattr(student, RECORD).names), "")
    if hasattr(teacher, ATTRIBUTE):
        raise ConfigError(
            f"The teacher given has no full-precision operator {first!r} of the student's shape. {advice}"
        )
    theirs = {slot.name: slot.tensor for slot in slots(teacher)}
    found = []
    wholes = dict(rewritten(student))
    inside = tuple(f"{name}." for name in wholes)
    ours = [(slot, slot.shape) for slot in slots(student) if not slot.name.startswith(inside)]
    for name, whole in wholes.items():  # the teacher has the original, not its parts
        ours += [(Slot(f"{name}.{key}", whole.original, key, False), shape) for key, shape in whole.shapes.items()]
    for slot, shape in ours:
        tensor = theirs.get(slot.name)
        if tensor is None or tensor.shape != shape or tensor.is_meta:
            module, _, key = slot.name.rpartition(".")
            has = "none" if tensor is None else f"{list(tensor.shape)} on {tensor.device}"
            raise ConfigError(
                f"The teacher given has no full-precision operator {module!r} of the student's shape: the student has "
                f"{key} {list(shape)}, the teacher {has}. {advice}"
            )
        found.append((slot, tensor))
    return found


@torch.no_grad()
def _copy(copies: list[tuple[Slot, torch.Tensor]]) -> None:
    """Copy tensors into the slots, in the dtype and on the device that these have."""
    for slot, tensor in copies:
        if slot.dropped is None and slot.tensor.shape == tensor.shape:
            slot.tensor.copy_(tensor)
        elif slot.tensor.numel() != tensor.numel():  # else a module with several names, filled already
            empty = slot.tensor
            slot.put(nn.Parameter(tensor.to(empty, copy=True), requires_grad=empty.requires_grad))


def describe(student: nn.Module) -> Description:
    """One row for each linear operator: name, type, bits, granularity, the rule that matched, or why it was skipped.

    For each it names the execution on the device where it is now, in float32, and why it is not in integers.
    After a trajectory it also says which operators had a constant input, and were computed once (``constant``).

    Raises:
        TrajectoryError: The module is not a student.
    """
    state = state_of(student)
    rows = getattr(student, RECORD).description.rows
    constant = state.last.constant if state.last else frozenset()
    found = operators(student)
    uncalled = state.names - state.called if state.last and state.last.total else frozenset()
    reuse = reuse_of(state)
    return Description(
        tuple(
            replace(
                _as_it_is(found[row.name], row) if row.name in found else row,
                constant=row.name in constant,
                uncalled=row.name in uncalled,
            )
            for row in rows
        ),
        "" if reuse is None else str(reuse),
    )


def _as_it_is(operator: QuantizedOperator, row: Row) -> Row:
    """The row with what evaluations showed, and the execution."""
    special = row.special
    if special == UNDECIDED and operator.undecided is None:
        special = "vector" if operator.found_vector else ""
    backend, kept = _execution(operator, special)
    return replace(row, activation=operator.activation_spec, backend=backend, special=special, reconstruction=kept)


def _execution(operator: QuantizedOperator, special: str) -> tuple[str, str]:
    """The execution of an operator where it is now, in float32; and how â is kept there, if not in float32."""
    if operator.in_float:
        return "full precision (as chosen)", ""
    weight = operator.module.weight
    choice = operator.choice(weight.device, torch.promote_types(weight.dtype, torch.float32))
    backend, kept = f"{choice}, {operator.fused}" if operator.fused else str(choice), ""
    if isinstance(operator, ModulatedOperator) and special != "vector":
        if operator.held_dtype is None and operator.may_hold_int16(choice.backend):
            kept = "int16 unless a sample is one vector"
        elif operator.held_dtype == torch.int16:
            kept = "int16"
    return backend, kept


def operators(student: nn.Module) -> dict[str, QuantizedOperator]:
    """The quantized operators of a student by name, in the order of the walk."""
    state_of(student)
    return {name: student.get_submodule(name) for name in getattr(student, RECORD).names}  # type: ignore[misc]


def _build(
    plan: Plan, state: ModulationState, weights: Mapping[str, PackedWeight] | None, config: QuantConfig
) -> QuantizedOperator:
    row = plan.row
    assert plan.adapter is not None
    packed = None if weights is None or row.weight is None else weights[row.name]
    args = (plan.module, row.name, plan.adapter, row.weight, row.activation, state, packed, config.backend)
    if row.modulation is None:
        operator = QuantizedOperator(*args)
    else:
        operator = ModulatedOperator(*args, modulation=row.modulation)
    if row.special == UNDECIDED:
        assert config.vectors is not None
        assert isinstance(config.vectors.activation, QuantSpec)
        operator.undecided = config.vectors.activation
    return operator


def _require_backend(operator: QuantizedOperator, backend: str) -> None:
    """Refuse a backend that was asked for by name and cannot run an operator exactly.

    Raises:
        ConfigError: It cannot.
    """
    weight = operator.module.weight
    # Choosing may try the processor, which is better done here than inside a trajectory.
    choice = operator.choice(weight.device, torch.promote_types(weight.dtype, torch.float32))
    if backend != "auto" and choice.name != backend:
        raise ConfigError(
            f"backend {backend!r} cannot run operator {operator.name!r} exactly: {choice.reason}. Use backend 'auto', "
            f"which simulates such operators, or exclude it with Rule({operator.name!r}, skip=True)."
        )


class _FreesScratch(Listener):
    """Gives the memory of eager mode back after each trajectory."""

    copied = True

    @override
    def closed(self, state: ModulationState) -> None:
        free_scratch()
