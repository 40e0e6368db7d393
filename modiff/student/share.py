"""Says which share of a student's work stays in full precision, once, as soon as shapes are known."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from modiff.operators.adapters import OperatorAdapter, adapter_of_type
from modiff.operators.quantized import QuantizedOperator
from modiff.student.example import call_example, empty_copy, example_of
from modiff.student.match import Plan
from modiff.trajectory.listeners import Listener

WARNED = 0.05
"""Share of the multiply-accumulates from which on a warning is worth a line."""


class FullPrecisionShare(Listener):
    """Warns of what stays in full precision although no rule says so, from the multiply-accumulates of one evaluation.

    That is the student's first one, unless :func:`macs_beforehand` could count before.

    Args:
        quantized: Operators of the student by name.
        left: Modules that stay in full precision although no rule says so, by name.
    """

    def __init__(self, quantized: dict[str, QuantizedOperator], left: dict[str, nn.Module]) -> None:
        self.quantized = quantized
        self.left = left
        self.macs: Counter[str] = Counter()
        self.handles: list[RemovableHandle] = []

    @override
    def before_evaluation(self, state: Any, arguments: Sequence[Tensor]) -> None:
        self.removed(state)
        if state.trajectory is None or not self.left:
            return
        for name, operator in self.quantized.items():
            self.handles.append(_count(self.macs, name, operator, operator.module))
        for name, module in self.left.items():
            self.handles.append(_count(self.macs, name, module, module))

    @override
    def after_evaluation(self, state: Any, output: Any) -> None:
        if self.handles:
            self.removed(state)
            self.settle(self.macs)

    def settle(self, macs: Mapping[str, int]) -> None:
        """Warn where the share is large, and count no more."""
        whole, left = sum(macs.values()), [name for name in self.left if macs.get(name)]
        full = sum(macs[name] for name in left)
        if whole and full / whole > WARNED:
            most = sorted(left, key=lambda name: -macs[name])
            logging.getLogger("modiff").warning(
                "%.0f %% of the multiply-accumulates of this student stay in full precision, because modiff cannot "
                "quantize these modules: %s. modiff.describe(student) says why.",
                100 * full / whole,
                ", ".join(f"{name!r} ({macs[name] / whole:.0%})" for name in most),
            )
        self.left = {}

    @override
    def removed(self, state: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []


def _count(macs: Counter[str], name: str, module: nn.Module, original: Any) -> RemovableHandle:
    """Count the multiply-accumulates of a module's calls.

    Where no adapter knows them, its weights are taken once for each place of its output.
    """
    adapter: OperatorAdapter | None = adapter_of_type(original)

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if adapter is not None:
            macs[name] += adapter.macs(original, first)
        else:
            weights = [p for p in original.parameters() if p.ndim > 1]
            macs[name] += sum(p.numel() * (first.numel() // p.shape[0]) for p in weights)

    return module.register_forward_hook(hook)


def is_left(plan: Plan) -> bool:
    """Whether an operator stays in full precision for another reason than a rule."""
    return plan.row.skipped is not None and plan.row.rule is None


def macs_beforehand(model: nn.Module, found: Iterable[Plan], example: Any) -> Counter[str]:
    """Multiply-accumulates of one evaluation by operator, before anything is quantized.

    Args:
        model: The denoiser, in full precision.
        found: What is to become of its operators.
        example: Arguments of its forward; None: those that its configuration tells, where it is one of diffusers'.

    Returns:
        Empty where nothing stays in full precision but by a rule, or where shapes are not known.
    """
    macs: Counter[str] = Counter()
    found = list(found)
    if not any(is_left(plan) for plan in found):
        return macs
    names = [plan.row.name for plan in found if plan.row.rule is None or plan.row.skipped is None]
    if example is not None:
        with _counting(macs, model, names), torch.no_grad():
            call_example(model, example)
        return macs
    example = example_of(model)
    if example is None:
        return macs
    try:
        model = empty_copy(model)
        with _counting(macs, model, names), torch.no_grad(), torch.device("meta"):
            model(**example)
    except Exception:  # networks may fail on tensors without content in any way; the first evaluation will tell
        macs.clear()
    return macs


@contextmanager
def _counting(macs: Counter[str], model: nn.Module, names: Iterable[str]) -> Any:
    modules = {name: model.get_submodule(name) for name in names}
    handles = [_count(macs, name, module, module) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def share_of(state: Any) -> FullPrecisionShare:
    """What watches a student with this state."""
    return next(listener for listener in state.listeners if isinstance(listener, FullPrecisionShare))
