"""Walk a denoiser, match rules, swap its linear operators; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modiff.config import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import ConfigError
from modiff.layers.modulated import ModulatedOperator
from modiff.layers.operators import OperatorAdapter, find_adapter
from modiff.layers.quantized import QuantizedOperator
from modiff.layers.state import ATTRIBUTE, ModulationState, state_of
from modiff.quantizers.granularity import activation_partition

RECORD = "_modiff_record"


@dataclass(frozen=True)
class Row:
    """What became of one operator.

    Args:
        name: Qualified name; of a module registered under several names, the first.
        type: Class of the original.
        weight: Its weight spec, None for full precision.
        activation: Likewise.
        modulation: None: plain quantization.
        rule: Pattern of the rule that matched last, None where the config's own fields apply.
        skipped: Why it was left untouched; None where it was quantized.
    """

    name: str
    type: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    modulation: Modulation | None = None
    rule: str | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Description:
    """One row for every linear operator of a student; prints as a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("operator", "type", "weight", "activation", "modulation", "rule", "skipped because")]
        cells += [
            (
                row.name,
                row.type,
                "" if row.skipped else _spec_text(row.weight),
                "" if row.skipped else _spec_text(row.activation),
                "" if row.skipped else _modulation_text(row.modulation),
                row.rule or "",
                row.skipped or "",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


@dataclass
class Record:
    """What :func:`quantize` did, kept on the student."""

    config: QuantConfig
    keep_teacher: bool
    description: Description
    names: dict[str, list[str]] = field(default_factory=dict)
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)


@dataclass
class _Plan:
    row: Row
    module: nn.Module
    adapter: OperatorAdapter | None
    names: list[str]


def quantize(model: nn.Module, config: QuantConfig, keep_teacher: bool = True) -> nn.Module:
    """Swap the linear operators of a denoiser for quantized ones, in place.

    Args:
        model: Any module; its forward is one evaluation.
        config: What to quantize, and how.
        keep_teacher: Keep the original weights, so that :func:`restore` works without the teacher.

    Returns:
        The same module, now the student.

    Raises:
        ConfigError: The model has no linear operators or is a student already, a rule's pattern matches nothing, or a
            granularity does not exist for an operator. The model is then unchanged.
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(f"config is {config!r}; give a QuantConfig, for example QuantConfig.preset('w8a4-modiff').")
    if hasattr(model, ATTRIBUTE) or any(isinstance(module, QuantizedOperator) for module in model.modules()):
        raise ConfigError("The model is a student already. Call modiff.restore(student) before quantizing it again.")
    if find_adapter(model) is not None:
        raise ConfigError(
            f"A bare {type(model).__name__} cannot be swapped in place. Wrap it: nn.Sequential(operator)."
        )
    plans = _plan(model, config)
    state = ModulationState()
    # Everything is built before anything is swapped: an error leaves the model as it was.
    built = [(plan, _build(plan, state)) for plan in plans if plan.row.skipped is None]
    record = Record(config, keep_teacher, Description(tuple(plan.row for plan in plans)))
    for plan, operator in built:
        record.names[plan.row.name] = plan.names
        for name in plan.names:
            _set(model, name, operator)
        if not keep_teacher:
            operator.drop_teacher()
    record.hooks = [
        model.register_forward_pre_hook(state.begin_evaluation),
        model.register_forward_hook(state.end_evaluation),
    ]
    setattr(model, ATTRIBUTE, state)
    setattr(model, RECORD, record)
    return model


def restore(student: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """Put the original operators back, in place; the teacher's outputs come back bit for bit.

    Args:
        student: What :func:`quantize` returned.
        teacher: Where the weights come from if the student was made with ``keep_teacher=False``.

    Returns:
        The same module, in full precision.

    Raises:
        ConfigError: The weights were not kept and no teacher is given, or it is another model. Nothing is changed then.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state_of(student).refuse_inside("restored")
    record: Record = getattr(student, RECORD)
    if not record.keep_teacher and teacher is None:
        raise ConfigError(
            "The student was made with keep_teacher=False. Give the teacher: restore(student, teacher=...)."
        )
    originals = {name: operator.module for name, operator in operators(student).items()}
    weights = {} if teacher is None else {name: _weights(teacher, name, module) for name, module in originals.items()}
    for name, names in record.names.items():
        original = originals[name]
        if teacher is not None:
            original.load_state_dict(weights[name])
        for alias in names:
            _set(student, alias, original)
    for hook in record.hooks:
        hook.remove()
    delattr(student, ATTRIBUTE)
    delattr(student, RECORD)
    return student


def describe(student: nn.Module) -> Description:
    """One row for each linear operator: name, type, bits, granularity, the rule that matched, or why it was skipped.

    Raises:
        TrajectoryError: The module is not a student.
    """
    state_of(student)
    return getattr(student, RECORD).description


def operators(student: nn.Module) -> dict[str, QuantizedOperator]:
    """The quantized operators of a student by name, in the order of the walk."""
    state_of(student)
    return {name: student.get_submodule(name) for name in getattr(student, RECORD).names}  # type: ignore[misc]


def _weights(teacher: nn.Module, name: str, original: nn.Module) -> dict[str, Tensor]:
    """The teacher's state dict of operator ``name``, if it fits."""
    try:
        found = teacher.get_submodule(name).state_dict()
    except AttributeError:
        found = {}
    expected = {key: value.shape for key, value in original.state_dict().items()}
    if {key: value.shape for key, value in found.items()} != expected:
        raise ConfigError(
            f"The teacher given has no full-precision operator {name!r} of the student's shape. Give the model that "
            "the student was made from; restore it first if it is a student too."
        )
    return found


def _bypassed(model: nn.Module) -> dict[str, str]:
    """Operators of which PyTorch's own modules use the weight without calling them, and why they are skipped."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found[_join(name, "out_proj")] = "nn.MultiheadAttention uses its weight directly"
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                found[_join(name, child)] = "nn.TransformerEncoderLayer's fast path uses its weight directly"
    return found


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child


def _plan(model: nn.Module, config: QuantConfig) -> list[_Plan]:
    found: dict[int, _Plan] = {}
    bypassed = _bypassed(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in found:
            found[id(module)].names.append(name)
            continue
        row, adapter = Row(name, type(module).__name__), None
        try:
            adapter = find_adapter(module)
            if adapter is None and not _is_unsupported(module):
                continue
            if adapter is None:
                row = Row(name, row.type, skipped="no adapter for this type")
        except ConfigError as error:
            row = Row(name, row.type, skipped=str(error))
        if name in bypassed:
            row, adapter = Row(name, row.type, skipped=bypassed[name]), None
        found[id(module)] = _Plan(row, module, adapter, [name])
    plans = list(found.values())
    if not any(plan.adapter for plan in plans):
        raise ConfigError(
            f"{type(model).__name__} has no linear operators that can be quantized (Linear, Conv1d, Conv2d, Conv3d)."
        )
    for rule in config.rules:
        if not any(plan.adapter and _match(rule, plan) for plan in plans):
            names = ", ".join(plan.row.name for plan in plans[:4])
            kind = "" if rule.type == "any" else f" of type {rule.type!r}"
            raise ConfigError(f"Rule pattern {rule.pattern!r} matches no operator{kind}. Names here are like: {names}.")
    for plan in plans:
        if plan.adapter is not None:
            plan.row = _decide(plan, config)
    return plans


def _is_unsupported(module: nn.Module) -> bool:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear, nn.MultiheadAttention)
    return isinstance(module, kinds)


def _match(rule: Rule, plan: _Plan) -> bool:
    assert plan.adapter is not None
    return any(rule.matches(name, plan.adapter.kind) for name in plan.names)


def _decide(plan: _Plan, config: QuantConfig) -> Row:
    assert plan.adapter is not None
    name, kind = plan.row.name, plan.row.type
    rule = next((r for r in reversed(config.rules) if _match(r, plan)), None)
    pattern = rule.pattern if rule else None
    if rule is not None and rule.skip:
        return Row(name, kind, rule=pattern, skipped="the rule says skip")
    if plan.module._forward_hooks or plan.module._forward_pre_hooks:
        raise ConfigError(
            f"Operator {name!r} ({kind}) has forward hooks, which its quantized twin would not run. Remove them before "
            f"modiff.quantize, or exclude it with Rule({name!r}, skip=True)."
        )
    weight, activation, modulation = config.weight, config.activation, config.modulation
    if rule is not None:
        weight = config.weight if isinstance(rule.weight, str) else rule.weight
        activation = config.activation if isinstance(rule.activation, str) else rule.activation
        modulation = config.modulation if isinstance(rule.modulation, str) else rule.modulation
    if activation is None:
        modulation = None
    else:
        try:
            activation_partition(activation, 3, plan.adapter.kind)
        except ConfigError as error:
            raise ConfigError(f"Operator {name!r} ({kind}): {error}") from error
    return Row(name, kind, weight, activation, modulation, pattern)


def _build(plan: _Plan, state: ModulationState) -> QuantizedOperator:
    row = plan.row
    assert plan.adapter is not None
    args = (plan.module, row.name, plan.adapter, row.weight, row.activation, state)
    if row.modulation is None:
        return QuantizedOperator(*args)
    return ModulatedOperator(*args, modulation=row.modulation)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _spec_text(spec: QuantSpec | None) -> str:
    if spec is None:
        return "full precision"
    parts = [f"{spec.bits} bit", spec.granularity, "symmetric" if spec.symmetric else "asymmetric"]
    if spec.clip != 1:
        parts.append(f"clip {spec.clip:g}")
    return ", ".join(parts)


def _modulation_text(modulation: Modulation | None) -> str:
    if modulation is None:
        return "none"
    parts = ["compensated" if modulation.error_compensation else "uncompensated", f"{modulation.warmup} warm-up"]
    if modulation.refresh_every:
        parts.append(f"refresh every {modulation.refresh_every}")
    return ", ".join(parts)
