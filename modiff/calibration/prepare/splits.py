"""Which operators are split: those whose input joins two tensors along channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modiff.calibration.loop.capture import ClosedLoop, Run
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.tracing import removed
from modiff.config.quant import QuantConfig, Split
from modiff.errors import CalibrationError
from modiff.operators.quantized import QuantizedOperator
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators
from modiff.trajectory.session import tensors_of

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_FEATURE = "_modiff_feature"


def mark_features(output: Any) -> None:
    """Note on the tensors themselves that an operator's output went into them."""
    for x in tensors_of(output):
        setattr(x, _FEATURE, True)


class _Done(Exception):
    """Ends a run after its first evaluation."""


class _Concatenations(TorchFunctionMode):
    """Keeps the outputs of ``torch.cat`` that join features, and where they were joined.

    Features are what depends on an operator's output: the sine and cosine of a time embedding are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; note what it joined."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not any(hasattr(x, _FEATURE) for x in tensors_of((args, kwargs))):
            return output
        mark_features(output)
        if func in _CONCATENATIONS:
            parts = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if isinstance(dim, int):
                self.found.append((output, dim % output.ndim, [part.shape[dim] for part in parts]))
        return output


def find_splits(teacher: nn.Module, config: QuantConfig, run: Run, reducer: Reducer | None = None) -> tuple[Split, ...]:
    """Find operators whose input is the very tensor that joins two others along channels, such as skip connections.

    Nothing is assumed about classes: the first evaluation is run, and every ``torch.cat`` in it is watched that joins
    something an operator computed (the sine and cosine of a time embedding are not split).

    Args:
        teacher: The denoiser; left as it is.
        config: What is quantized; only such operators are split.
        run: As for :func:`modiff.calibration.calibrate`.
        reducer: The processes that share the run; each one that has a trajectory watches its first evaluation.

    Returns:
        What to set :attr:`QuantConfig.splits` to.

    Raises:
        CalibrationError: The run evaluates nothing.
    """
    student = convert(shared_copy(teacher), replace(config, activation=None, modulation=None, rules=()), True)
    wanted = set(operators(convert(shared_copy(teacher), config, True)))
    seen: dict[str, set[int | None]] = {}
    mode = _Concatenations()

    def hook(operator: QuantizedOperator, args: tuple[Any, ...]) -> None:
        x = args[0]
        channel = x.ndim - 1 if operator.adapter.kind == "linear" else 1
        parts = next((sizes for output, dim, sizes in mode.found if output is x and dim == channel), [])
        splits = len(parts) == 2 and min(parts) > 0 and int(getattr(operator.module, "groups", 1)) == 1
        seen.setdefault(operator.name, set()).add(parts[0] if splits else None)

    def end(*_: Any) -> None:
        raise _Done

    handles = [operator.register_forward_pre_hook(hook) for operator in operators(student).values()]
    handles += [o.register_forward_hook(lambda *seen: mark_features(seen[2])) for o in operators(student).values()]

    def watched() -> bool:
        with removed(handles), mode:
            try:
                ClosedLoop(student, teacher, run).drive(lambda *_: None, end)
            except _Done:
                return True
        return False

    reducer = reducer or Reducer()
    found = reducer.gather((reducer.each(watched), seen))
    if not any(evaluated for evaluated, _ in found):
        raise CalibrationError("The run that was given never called the student.")
    seen = {}
    for _, part in found:
        for name, places in part.items():
            seen[name] = seen.get(name, set()) | places
    ones = {name: next(iter(places)) for name, places in seen.items() if len(places) == 1 and name in wanted}
    return tuple(Split(name, at) for name, at in ones.items() if at is not None)
