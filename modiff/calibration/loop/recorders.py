"""What is kept of a closed-loop run: the student's inputs, and what the teacher makes of the same evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.moments import batched, input_vectors, num_positions, output_vectors
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.tracing import Evaluation, Trace, removed
from modiff.errors import CalibrationError
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.quantizers.affine import fake_quantize


class MomentRecorder:
    """Takes vectors of operators' inputs, and of the teacher's outputs at the same places, for :class:`.Moments`.

    In each recorded evaluation the student's hooks draw places and keep the inputs there; at its end the teacher
    answers to the same input, and its hooks pair its outputs with them, call by call.

    Args:
        operators: The student's, by name.
        teacher: Has operators of the same names.
        trace: Of the run that will be recorded.
        evaluations: How many of a trajectory; None: all.
        positions: Input vectors of each operator, in all.
        generator: Draws them, on the CPU.
        add: ``add(name, x, y)`` gets the vectors of each call.
    """

    def __init__(
        self,
        operators: Mapping[str, QuantizedOperator],
        teacher: nn.Module,
        trace: Trace,
        evaluations: int | None,
        positions: int,
        generator: torch.Generator,
        add: Callable[[str, Tensor, Tensor], None],
    ) -> None:
        self.operators = operators
        self.teacher = teacher
        self.generator = generator
        self.add = add
        self._chosen = trace.choose(evaluations)
        recorded = trace.recorded(self._chosen)
        # What one call gives, rounded up.
        self._share = {name: -(-positions // (recorded * trace.calls.get(name, 1))) for name in operators}
        self._recording = False
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def student_hooks(self) -> list[RemovableHandle]:
        """Register hooks on the student's operators; the caller removes them."""
        return [op.register_forward_hook(partial(self._draw, name)) for name, op in self.operators.items()]

    def begin(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin an evaluation of the student."""
        self._recording = index in self._chosen
        self._waiting.clear()

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End an evaluation of the student, and have the teacher answer to the same input."""
        if self._recording:
            modules = {name: self.teacher.get_submodule(name) for name in self.operators}
            with removed([m.register_forward_hook(partial(self._pair, name)) for name, m in modules.items()]):
                self.teacher(*args, **kwargs)

    def _draw(self, name: str, operator: QuantizedOperator, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not self._recording:
            return
        waiting = self._waiting.setdefault(name, [])
        x = effective_input(operator, args[0], len(waiting))
        x, y = batched(operator, x), batched(operator, output, args[0].ndim)
        kind = operator.adapter.kind
        places = torch.randperm(num_positions(kind, y), generator=self.generator)[: self._share[name]]
        places = places.sort().values.to(x.device)
        waiting.append((places, input_vectors(operator.module, kind, x, places)))

    def _pair(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        operator = self.operators[name]
        places, x = self._waiting[name].pop(0)
        y = batched(operator, output, args[0].ndim)
        self.add(name, x, output_vectors(module, operator.adapter.kind, y, places))


class SampleRecorder:
    """Puts samples of a block's inputs in the student, and of the teacher's outputs of it, into a store.

    Args:
        block: One of ``trace.usable``.
        teacher: Has a block of the same name.
        trace: Of the run that will be recorded.
        evaluations: How many of a trajectory; None: all.
        most: Samples, in all: each recorded evaluation gives its share, as far as the batch goes.
        store: Gets ``input.0`` .. and ``target``.
        generator: Draws them, on the CPU.

    Attributes:
        keys: For each row of the store, the place in the whole run of the evaluation that it is from.
        arguments: How the inputs made up the block's arguments, in each recorded evaluation.
    """

    def __init__(
        self,
        block: str,
        teacher: nn.Module,
        trace: Trace,
        evaluations: int | None,
        most: int,
        store: SampleStore,
        generator: torch.Generator,
    ) -> None:
        self.block = block
        self.teacher = teacher
        self.store = store
        self.generator = generator
        self.keys: list[int] = []
        self.arguments: list[CallArguments] = []
        self._trace, self._most = trace, most
        self._chosen = trace.choose(evaluations)
        self._trajectory = 0
        self._evaluation = Evaluation()
        self._waiting: dict[str, Tensor] = {}

    def student_hooks(self, student: nn.Module) -> list[RemovableHandle]:
        """Register a hook on the student's block; the caller removes it."""
        return [student.get_submodule(self.block).register_forward_pre_hook(self._draw, with_kwargs=True)]

    def begin(self, trajectory: int, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin evaluation ``index`` of a trajectory of the whole run."""
        self._trajectory = trajectory
        self._evaluation.start(index, args, kwargs)
        self._waiting.clear()

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """End an evaluation of the student, and have the teacher answer to the same input."""
        if self._waiting:
            with removed([self.teacher.get_submodule(self.block).register_forward_hook(self._pair)]):
                self.teacher(*args, **kwargs)

    def _draw(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._evaluation.index not in self._chosen:
            return
        place = self._trace.ordinal(self._chosen, self._trajectory, self._evaluation.index)
        share = self._trace.share(self._chosen, place, self._most)
        arguments, tensors = CallArguments.of(args, kwargs)
        self.arguments.append(arguments)
        if share == 0:
            return
        batch = len(next(iter(tensors.values())))
        rows = torch.randperm(batch, generator=self.generator)[:share].sort().values
        self.keys.extend([place] * len(rows))
        self._waiting.update({"rows": rows} | {key: t[rows.to(t.device)] for key, t in tensors.items()})

    def _pair(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = self._waiting.pop("rows")
        found = {**self._waiting, "target": output[rows.to(output.device)]}
        for key, tensor in found.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CalibrationError(f"NaN or Inf in {key} of block {self.block!r} in {self._evaluation}.")
        self.store.append(found)


@torch.no_grad()
def effective_input(operator: QuantizedOperator, x: Tensor, call: int) -> Tensor:
    """Return the input to which an operator's weight was applied in the call that just returned.

    Args:
        operator: Of a student.
        x: What it was given.
        call: Which of its calls in this evaluation, from 0.

    Returns:
        ``Q(a)``; where modulated, the reconstruction ``â`` (the output is ``A(â) + bias``); ``a`` itself where
        activations stay in full precision, or without error compensation, where no single input gives the output.
    """
    if operator.activation_spec is None:
        return x
    if isinstance(operator, ModulatedOperator):
        run = operator.state.trajectory
        assert run is not None
        return run.caches[operator.name][call].reconstruction() if operator.modulation.error_compensation else x
    from_float = x.to(torch.promote_types(x.dtype, torch.float32))
    return fake_quantize(from_float, operator.partition(x.ndim), operator.activation_spec)
