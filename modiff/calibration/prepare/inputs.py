"""What is prepared before weights are rounded: halves of concatenated inputs, divisors of input channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modiff.calibration.loop.capture import ClosedLoop, Run
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.structure import shared_copy
from modiff.calibration.loop.tracing import removed
from modiff.config.quant import QuantConfig, Split
from modiff.errors import CalibrationError
from modiff.operators.quantized import QuantizedOperator
from modiff.student.swap import convert, operators
from modiff.trajectory.session import tensors_of

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
TINY = 1e-5
"""Smallest absolute value that a channel counts with, as in SmoothQuant's reference code."""


_FEATURE = "_modiff_feature"


def mark_features(output: Any) -> None:
    """Note on the tensors themselves that an operator's output went into them."""
    for x in tensors_of(output):
        setattr(x, _FEATURE, True)


class _Done(Exception):
    """The first evaluation is over."""


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
    """Operators whose input is the very tensor that two others were joined to along channels, such as skip connections.

    Nothing is assumed about classes: the first evaluation is run, and every ``torch.cat`` in it is watched that joins
    something an operator computed (the sine and cosine of a time embedding are not split).

    Args:
        teacher: The denoiser; left as it is.
        config: What is quantized; only such operators are split.
        run: As for :func:`modiff.calibration.calibrate`.
        reducer: Likewise; every process that has a trajectory watches its first evaluation.

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
        raise CalibrationError("The run that was given evaluated the student not once.")
    seen = {}
    for _, part in found:
        for name, places in part.items():
            seen[name] = seen.get(name, set()) | places
    ones = {name: next(iter(places)) for name, places in seen.items() if len(places) == 1 and name in wanted}
    return tuple(Split(name, at) for name, at in ones.items() if at is not None)


def find_divisors(loop: ClosedLoop, strength: float) -> dict[str, Tensor]:
    """Divisors that move outliers of input channels into the weight: ``max|X|^α / max|W|^(1-α)`` (SmoothQuant, eq. 4).

    X is what each Linear's quantizer really gets in closed loop: residuals, where modulated.

    Args:
        loop: The student, all of it, before anything is rewritten.
        strength: α; 0 evens out the weights, 1 the inputs.

    Returns:
        Float32 ``[in]`` of each Linear of which weight and input are quantized; geometric mean 1.
    """
    chosen = {
        name: operator
        for name, operator in operators(loop.student).items()
        if operator.adapter.kind == "linear"
        and operator.weight_spec is not None
        and operator.activation_spec is not None
    }
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(operator: QuantizedOperator, args: tuple[Any, ...]) -> None:
            x = operator.quantizer_input(args[0])
            if x is not None:
                found = x.abs().reshape(-1, x.shape[-1]).amax(dim=0)
                largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return watch

    with removed([operator.register_forward_pre_hook(hook(name)) for name, operator in chosen.items()]):
        loop.drive(lambda *_: None, lambda *_: None)
    divisors = {}
    for name, x in _largest_of_all(largest, loop.reducer).items():
        w = chosen[name].module.weight.detach().float().abs().amax(dim=0).clamp_min(TINY)
        logs = strength * x.to(w).clamp_min(TINY).log() - (1 - strength) * w.log()
        divisors[name] = (logs - logs.mean()).exp()
    return divisors


def _largest_of_all(largest: dict[str, Tensor], reducer: Reducer) -> dict[str, Tensor]:
    """Element-wise maxima over all processes, of which one may lack an operator; the same names in the same order."""
    if reducer.world_size == 1:
        return largest
    merged: dict[str, Tensor] = {}
    for part in reducer.gather({name: x.cpu() for name, x in largest.items()}):
        for name, x in part.items():
            merged[name] = torch.maximum(merged[name], x) if name in merged else x
    return merged
