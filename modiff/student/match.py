"""Walk a denoiser, match rules, and decide what becomes of each operator."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from modiff.config import QuantConfig, QuantSpec, Rule, Special
from modiff.config.specs import check_range
from modiff.errors import ConfigError
from modiff.operators.adapters import OperatorAdapter, bypassed_operators, find_adapter, is_unsupported, own_linear
from modiff.operators.rewrites import RewrittenOperator
from modiff.quantizers.granularity import activation_partition
from modiff.student.describe import Description, Row

UNDECIDED = "undecided"
"""An operator of which the first evaluation will show whether it reads one vector per sample."""


@dataclass
class Plan:
    """What is to become of one module.

    Args:
        row: Of the description.
        module: The original.
        adapter: How its type applies a weight; None: it is left untouched.
        names: Every name of the module, its first one in front.
        wholes: Names of the operator of which the module is a part.
    """

    row: Row
    module: nn.Module
    adapter: OperatorAdapter | None
    names: list[str]
    wholes: list[str] = field(default_factory=list)


def plan(model: nn.Module, config: QuantConfig) -> Description:
    """What :func:`modiff.quantize` would do.

    Raises:
        ConfigError: As for :func:`modiff.quantize`.
    """
    return Description(tuple(plan.row for plan in plans(model, config)))


def plans(model: nn.Module, config: QuantConfig) -> list[Plan]:
    """A plan for each linear operator, in the order of the walk.

    Raises:
        ConfigError: As for :func:`modiff.quantize`.
    """
    found: dict[int, Plan] = {}
    bypassed = bypassed_operators(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in found:
            found[id(module)].names.append(name)
            continue
        row, adapter = Row(name, type(module).__name__), None
        try:
            adapter = find_adapter(module)
            own = own_linear(module) if adapter is None else None
            if adapter is None and own is None and not is_unsupported(module):
                continue
            if own is not None:
                row = Row(name, row.type, skipped=f"it calls {own} itself; register an adapter for it (docs/models.md)")
            elif adapter is None:
                row = Row(name, row.type, skipped="no adapter for this type")
        except ConfigError as error:
            row = Row(name, row.type, skipped=str(error))
        if name in bypassed:
            row, adapter = Row(name, row.type, skipped=bypassed[name]), None
        found[id(module)] = Plan(row, module, adapter, [name])
    all_ = list(found.values())
    for plan in all_:
        parents = {name.rpartition(".")[0] for name in plan.names}
        plan.wholes = [name for name in parents if isinstance(model.get_submodule(name), RewrittenOperator)]
    if not any(plan.adapter for plan in all_):
        raise ConfigError(
            f"{type(model).__name__} has no linear operators that can be quantized (Linear, Conv1d to Conv3d, "
            "ConvTranspose1d to 3d)."
        )
    for rule in config.rules:
        if not any(plan.adapter and _match(rule, plan) for plan in all_):
            names = ", ".join(plan.row.name for plan in all_[:4])
            kind = "" if rule.type == "any" else f" of type {rule.type!r}"
            raise ConfigError(f"Rule pattern {rule.pattern!r} matches no operator{kind}. Names here are like: {names}.")
    for plan in all_:
        if plan.adapter is not None:
            plan.row = _decide(plan, config)
    return all_


def _match(rule: Rule, plan: Plan) -> bool:
    assert plan.adapter is not None
    return any(rule.matches(name, plan.adapter.kind) for name in (*plan.names, *plan.wholes))


def _decide(plan: Plan, config: QuantConfig) -> Row:
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
    special, part = _special(plan, config)
    for exception in (part, rule):  # the rule has the last word
        if exception is not None:
            weight = weight if isinstance(exception.weight, str) else exception.weight
            activation = activation if isinstance(exception.activation, str) else exception.activation
    if rule is not None:
        modulation = modulation if isinstance(rule.modulation, str) else rule.modulation
        special = "" if special == UNDECIDED and not isinstance(rule.activation, str) else special
    if activation is None:
        modulation = None
    else:
        try:
            activation_partition(activation, 3, plan.adapter.kind)
            vectors = config.vectors.activation if special == UNDECIDED and config.vectors is not None else None
            for spec in (activation, vectors):
                if isinstance(spec, QuantSpec):
                    check_range(spec, modulation)
        except ConfigError as error:
            raise ConfigError(f"Operator {name!r} ({kind}): {error}") from error
    return Row(name, kind, weight, activation, modulation, pattern, special=special)


def _special(plan: Plan, config: QuantConfig) -> tuple[str, Special | None]:
    """Of which special kind an operator is, in a word for the table, and what it therefore gets."""
    names = {*plan.names, *plan.wholes}
    for kind, part in (("end", config.ends), ("vector", config.vectors)):
        if part is not None and part.names is not None and names & set(part.names):
            return kind, part
    vectors, own = config.vectors, config.activation
    if vectors is None or vectors.names is not None or not isinstance(vectors.activation, QuantSpec):
        return "", None
    return (UNDECIDED if own is not None and own.range != "calibrated" else ""), None
