"""Closed-loop data: what the operators of a student really see along its own trajectories (trap 7 of METHOD.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.moments import Moments, input_vectors, no_data, num_positions, output_vectors
from modiff.calibration.reduction import Reducer
from modiff.calibration.samples import SampleStore
from modiff.calibration.structure import Structure
from modiff.calibration.tracing import Evaluation, ModuleCalls, Trace, merged, raw_bytes
from modiff.conversion import operators
from modiff.errors import CalibrationError
from modiff.layers.modulated import ModulatedOperator
from modiff.layers.quantized import QuantizedOperator
from modiff.layers.state import state_of
from modiff.quantizers.affine import fake_quantize

Run = Callable[[nn.Module], Any]
"""A sampling loop: opens one or more ``modiff.trajectory(student)`` and samples in them; the same at every call."""


class ClosedLoop:
    """A student, its teacher, and the run that takes the student from noise to images.

    At each recorded evaluation the teacher answers to the very input that the student got, so that targets are in full
    precision while the trajectory, and all that is quantized on it, is the student's.

    Args:
        student: With all quantization that it is to have.
        teacher: Another module, in full precision; it may share the student's tensors.
        run: The sampling loop; where several processes share the work, it samples this one's trajectories.
        reducer: The processes that share it.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, run: Run, reducer: Reducer | None = None) -> None:
        self.student = student
        self.teacher = teacher
        self.run = run
        self.reducer = reducer or Reducer()
        self.mine: list[int] = []
        self.trajectory = 0

    def trace(self) -> Trace:
        """Run once; look at every evaluation of all processes, keep none of it.

        Raises:
            CalibrationError: No trajectory was run, or an activation is NaN or Inf (the message says where).
        """
        trace = Trace()
        modules = ModuleCalls(self.student)
        evaluation, state = Evaluation(), state_of(self.student)

        def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            evaluation.start(index, args, kwargs)
            modules.begin()
            if index == 0:
                trace.lengths.append(0)
                digest = hashlib.sha256()
                for tensor in Structure.of(args, kwargs)[1].values():
                    digest.update(raw_bytes(tensor))
                trace.digests.append(digest.hexdigest())

        def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            trace.lengths[-1] += 1
            assert state.trajectory is not None
            trace.steps = max(trace.steps, state.trajectory.current.total)
            modules.end(output)

        def called(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                if args[0].numel() and not torch.isfinite(torch.stack(args[0].detach().aminmax())).all():
                    raise CalibrationError(
                        f"NaN or Inf in the input of operator {name!r} in {evaluation}. Check the teacher in this "
                        "dtype, or keep the operator in full precision by a rule."
                    )
                if trace.lengths == [0]:  # first evaluation of the first trajectory
                    trace.calls[name] = trace.calls.get(name, 0) + 1

            return hook

        hooks = [op.register_forward_hook(called(name)) for name, op in operators(self.student).items()]
        with removed(hooks + modules.hooks):
            self.drive(begin, end)
        trace.order, trace.usable = list(trace.calls), modules.usable()
        trace = merged(self.reducer.gather(trace), self.reducer.rank)
        self.mine = trace.mine
        if not trace.lengths:
            raise CalibrationError(
                "No data captured: the run that was given evaluated the student not once. Let run(student) open "
                "modiff.trajectory(student) and sample in it."
            )
        return trace

    def moments(
        self, names: Sequence[str], trace: Trace, evaluations: int | None, positions: int, generator: torch.Generator
    ) -> dict[str, Moments]:
        """Run once; moments of some operators' inputs, and of the teacher's outputs at the same places.

        Several processes add up theirs.

        Args:
            names: The operators. All their moments are held at once (:func:`.moments.moment_bytes`).
            trace: Of this run.
            evaluations: How many of a trajectory; None: all.
            positions: Input vectors of each operator, in all: drawn anew in each evaluation.
            generator: Draws them, on the CPU; see :meth:`drive`.

        Raises:
            CalibrationError: An operator is never called, or its moments are not finite.
        """
        found = operators(self.student)
        chosen = trace.choose(evaluations)
        moments = {name: Moments.empty(found[name]) for name in names}
        pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        recording = False

        def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal recording
            recording = index in chosen
            pending.clear()

        def student_hook(name: str) -> Callable[..., None]:
            share = -(-positions // (trace.recorded(chosen) * trace.calls.get(name, 1)))

            def hook(operator: QuantizedOperator, args: tuple[Tensor, ...], output: Tensor) -> None:
                if recording:
                    waiting = pending.setdefault(name, [])
                    x = effective_input(operator, args[0], len(waiting))
                    x, y = _batched(operator, x), _batched(operator, output, args[0].ndim)
                    places = torch.randperm(num_positions(operator.adapter.kind, y), generator=generator)[:share]
                    places = places.sort().values.to(x.device)
                    waiting.append((places, input_vectors(operator.module, operator.adapter.kind, x, places)))

            return hook

        def teacher_hook(name: str) -> Callable[..., None]:
            operator = found[name]

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                places, x = pending[name].pop(0)
                y = _batched(operator, output, args[0].ndim)
                moments[name].update(x, output_vectors(module, operator.adapter.kind, y, places))

            return hook

        def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if recording:
                with removed([self.teacher.get_submodule(n).register_forward_hook(teacher_hook(n)) for n in names]):
                    self.teacher(*args, **kwargs)

        with removed([found[name].register_forward_hook(student_hook(name)) for name in names]):
            self.drive(begin, end, generator)
        for name in names:
            if self.reducer.world_size > 1:
                moments[name].reduce(self.reducer.all_reduce)
            moments[name].check(name)
        return moments

    def samples(
        self,
        block: str,
        trace: Trace,
        evaluations: int | None,
        most: int,
        store: SampleStore,
        generator: torch.Generator,
    ) -> Structure:
        """Run once; put a block's inputs in the student, and the teacher's outputs of it, into a store.

        Afterwards the store of the first process holds those of all, in the order of trajectories.

        Args:
            block: One of ``trace.usable``.
            trace: Of this run.
            evaluations: How many of a trajectory; None: all.
            most: Samples, in all: drawn anew in each evaluation, where the batch holds its share.
            store: Gets ``input.0`` .. and ``target``.
            generator: Draws them, on the CPU; see :meth:`drive`.

        Returns:
            How the inputs make up the block's arguments.

        Raises:
            CalibrationError: The block is never called, its samples are not finite, or the store is full.
        """
        chosen, evaluation = trace.choose(evaluations), Evaluation()
        total = trace.recorded(chosen)
        keys: list[int] = []
        held: dict[str, Tensor] = {}
        structures: list[Structure] = []

        def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            evaluation.start(index, args, kwargs)
            held.clear()

        def student_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if evaluation.index in chosen:
                key = trace.ordinal(chosen, self.trajectory, evaluation.index)
                share = most * (key + 1) // total - most * key // total
                structure, tensors = Structure.of(args, kwargs)
                structures.append(structure)
                if share == 0:
                    return
                batch = len(next(iter(tensors.values())))
                rows = torch.randperm(batch, generator=generator)[:share].sort().values
                keys.extend([key] * len(rows))
                held.update({"rows": rows} | {key: t[rows.to(t.device)] for key, t in tensors.items()})

        def teacher_hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            rows = held.pop("rows")
            found = {**held, "target": output[rows.to(output.device)]}
            for key, tensor in found.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise CalibrationError(f"NaN or Inf in {key} of block {block!r} in {evaluation}.")
            store.append(found)

        def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if held:
                with removed([self.teacher.get_submodule(block).register_forward_hook(teacher_hook)]):
                    self.teacher(*args, **kwargs)

        with removed([self.student.get_submodule(block).register_forward_pre_hook(student_hook, with_kwargs=True)]):
            self.drive(begin, end, generator)
        store.collect(keys, self.reducer)
        found = next((s for part in self.reducer.gather(structures[:1]) for s in part), None)
        if found is None:
            raise no_data(block)
        return found

    def drive(
        self, begin: Callable[..., None], end: Callable[..., None], generator: torch.Generator | None = None
    ) -> None:
        """Run the student; ``begin(index, args, kwargs)`` and ``end(args, kwargs, output)`` at each evaluation.

        Args:
            begin: Before it.
            end: After it.
            generator: Seeded anew for each trajectory, from its own seed and the trajectory's place in the whole run:
                what is drawn does not depend on how trajectories are dealt to processes. At the end it is as in the
                beginning.

        Raises:
            Exception: What the run of any process raised.
        """
        state = state_of(self.student)
        seed = 0 if generator is None else generator.initial_seed()
        seen: list[Any] = []

        def next_trajectory() -> None:
            place = len(seen)
            seen.append(state.trajectory)
            self.trajectory = self.mine[place] if place < len(self.mine) else place
            if generator is not None:  # odd: the generator keeps 32 bits, in which all places differ
                generator.manual_seed((seed + self.trajectory * 0x9E3779B97F4A7C15) % 2**63)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if state.trajectory is None:
                raise CalibrationError(
                    "The run that was given evaluates the student outside a trajectory. Sample inside "
                    "`with modiff.trajectory(student):`."
                )
            if not seen or state.trajectory is not seen[-1]:
                next_trajectory()
            begin(state.trajectory.total, args, kwargs)

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            end(args, kwargs, output)

        hooks = [
            self.student.register_forward_pre_hook(before, with_kwargs=True),
            self.student.register_forward_hook(after, with_kwargs=True),
        ]
        with removed(hooks):
            self.reducer.each(lambda: self.run(self.student))
        if generator is not None:
            generator.manual_seed(seed)


@torch.no_grad()
def effective_input(operator: QuantizedOperator, x: Tensor, call: int) -> Tensor:
    """The input to which an operator's weight was applied, in the call that just returned.

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


def _batched(operator: QuantizedOperator, x: Tensor, ndim: int | None = None) -> Tensor:
    """``x`` with a batch dim, where the operator was called with a single sample."""
    return x if operator.adapter.is_batched(operator.module, ndim or x.ndim) else x[None]


@contextmanager
def removed(hooks: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
