"""Refuses a student whose modules or weights were changed behind its back, before its next trajectory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from modiff.errors import ConfigError, TrajectoryError
from modiff.operators.adapters import find_adapter, is_unsupported
from modiff.operators.quantized import QuantizedOperator
from modiff.student.refusals import refuse_hooks
from modiff.student.reuse import reuse_of
from modiff.trajectory.listeners import Listener
from modiff.trajectory.session import ModulationState

ANEW = "Call modiff.restore(student), make the change there, and quantize again"


class Guard(Listener):
    """Compares the student with what it was made of whenever a trajectory opens.

    A quantized operator keeps integers of its weight, so it does not see what is written to the original's: by
    ``EMAModel.copy_to``, by fused adapters, through ``.data``. Modules that are put in the places of operators, or
    beside them, such as fused projections and adapters, would run in full precision.

    Args:
        student: The student.
        names: Of its quantized operators.
    """

    copied = True

    def __init__(self, student: nn.Module, names: list[str]) -> None:
        self.student = student
        self.names = names
        self.linear = {name for name, _ in linear_modules(student)}
        self.seen: tuple[object, ...] = ()

    @override
    def before_trajectory(self, state: ModulationState) -> None:
        refuse_hooks(self.student, state.stateful or reuse_of(state) is not None)
        found = dict(linear_modules(self.student))
        for name in self.names:
            if not isinstance(found.get(name), QuantizedOperator):
                self._refuse_wrapped(found)
                raise TrajectoryError(
                    f"Operator {name!r} is no longer in its place in the student: something replaced or removed it "
                    f"(fused projections, adapters). {ANEW}."
                )
        new = [name for name in found if name not in self.linear]
        if new:
            raise TrajectoryError(
                f"{new[0]!r} ({type(found[new[0]]).__name__}) was added to the student after it was quantized, and "
                f"would run in full precision. {ANEW}."
            )
        self._check_operators([m for m in found.values() if isinstance(m, QuantizedOperator)])

    @override
    def before_evaluation(self, state: ModulationState, arguments: Sequence[Tensor]) -> None:
        """Outside of a trajectory: compare again where PyTorch counted a write to a weight."""
        if state.trajectory is not None:
            return
        weights = [
            m.module._parameters.get("weight") for m in self.student.modules() if isinstance(m, QuantizedOperator)
        ]
        seen = tuple((id(w), None if w is None or w.is_inference() else w._version) for w in weights)
        if seen != self.seen:
            self.before_trajectory(state)
            self.seen = seen

    def _refuse_wrapped(self, found: Iterable[str]) -> None:
        """Say so where the operators are still there, inside what ``torch.compile`` put in the place of a module.

        Raises:
            TrajectoryError: They are.
        """
        wrapped = next((name for name in found if "_orig_mod" in name.split(".")), None)
        if wrapped is not None:
            where = wrapped.split("._orig_mod")[0]
            raise TrajectoryError(
                f"Module {where!r} of the student was wrapped by torch.compile, which gives its operators other names. "
                "Put the module itself back, and compile the student by modiff.compile(student)."
            )

    def _check_operators(self, quantized: list[QuantizedOperator]) -> None:
        flags = []
        with torch.no_grad():
            for operator in quantized:
                _follow(operator)
                flags.append(operator.weight_changed())
        known = [(op, flag) for op, flag in zip(quantized, flags, strict=True) if flag is not None]
        if not known:
            return
        changed = torch.stack([flag.to(known[0][1].device) for _, flag in known]).tolist()
        if any(changed):
            operator = known[changed.index(True)][0]
            raise TrajectoryError(
                f"The weight of operator {operator.name!r} was written to after it was quantized, and the student "
                f"would ignore the change (weights of an EMA, fused adapters, .data). {ANEW}."
            )

    @override
    def removed(self, state: ModulationState) -> None:
        state.listeners.remove(self)


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear operators, quantized or not, by all their names; the originals inside quantized ones are left out."""
    inside: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedOperator):
            inside.add(id(module.module))
            yield name, module
        elif id(module) not in inside and _is_linear(module):
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    try:
        return find_adapter(module) is not None or is_unsupported(module)
    except ConfigError:
        return True


def _follow(operator: QuantizedOperator) -> None:
    """Follow a change of the original's geometry (stride, padding, ...); refuse what the operator cannot follow.

    Raises:
        TrajectoryError: The original runs code of its own now, which the quantized operator does not.
    """
    module = operator.module
    try:
        adapter = find_adapter(module)
    except ConfigError as error:
        raise TrajectoryError(
            f"Operator {operator.name!r} was changed after it was quantized: {error}, which the quantized operator "
            f"would not run. {ANEW}."
        ) from error
    if type(adapter) is not type(operator.adapter) or module._forward_hooks or module._forward_pre_hooks:
        raise TrajectoryError(
            f"Operator {operator.name!r} was changed after it was quantized: its original has forward hooks or another "
            f"class, which the quantized operator would not follow. {ANEW}."
        )
    shape = adapter.shape(module, operator.weight_spec)
    fixed = {name: getattr(operator.shape, name) for name in ("in_channels", "out_channels", "kernel", "groups")}
    if any(getattr(shape, name) != value for name, value in fixed.items()):
        raise TrajectoryError(
            f"Operator {operator.name!r} was changed after it was quantized: its channels, kernel or groups are other "
            f"ones, which its weight does not fit. {ANEW}."
        )
    if shape != operator.shape:
        operator.use_shape(shape)
