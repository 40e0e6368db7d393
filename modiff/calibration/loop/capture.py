"""Closed-loop data: what the operators of a student really see along its own trajectories (trap 7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.moments import Moments, no_data
from modiff.calibration.loop.recorders import MomentRecorder, SampleRecorder
from modiff.calibration.loop.reduction import Reducer
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.sums import MomentSums
from modiff.calibration.loop.tracing import Evaluation, ModuleCalls, Trace, merged, removed
from modiff.errors import CalibrationError
from modiff.storage.hashing import hash_bits
from modiff.student.swap import operators
from modiff.trajectory.session import state_of

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
        """Run once and look at every evaluation of all processes, without keeping any.

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
                trace.digests.append(hash_bits(CallArguments.of(args, kwargs)[1].values()))

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
                "No data captured: the run that was given never called the student. Let run(student) open "
                "modiff.trajectory(student) and sample in it."
            )
        return trace

    def moments(
        self,
        names: Sequence[str],
        trace: Trace,
        evaluations: int | None,
        positions: int,
        generator: torch.Generator,
        scratch: Path,
        memory: int,
    ) -> dict[str, Moments]:
        """Run once and find moments of some operators' inputs, and of the teacher's outputs at the same places.

        Several processes deal the operators among them in turn: each gets the moments of its own, over the
        trajectories of all, with the bits that a single process would find.

        Args:
            names: The operators. All their moments are held at once (:func:`.moments.moment_bytes`).
            trace: Of this run.
            evaluations: How many of a trajectory; None: all.
            positions: Input vectors of each operator, in all: drawn anew in each evaluation.
            generator: Draws them, on the CPU; see :meth:`drive`.
            scratch: A folder for what several processes have to send and cannot hold in memory.
            memory: Bytes of it that they hold.

        Raises:
            CalibrationError: An operator is never called, or its moments are not finite.
        """
        found = operators(self.student)
        chosen = {name: found[name] for name in names}
        sums = MomentSums(chosen, self.reducer, scratch, memory)

        def add(name: str, x: Tensor, y: Tensor) -> None:
            sums.add(name, self.trajectory, x, y)

        recorder = MomentRecorder(chosen, self.teacher, trace, evaluations, positions, generator, add)
        with removed(recorder.student_hooks()):
            self.drive(recorder.begin, recorder.end, generator)
        return sums.finish()

    def samples(
        self,
        block: str,
        trace: Trace,
        evaluations: int | None,
        most: int,
        store: SampleStore,
        generator: torch.Generator,
    ) -> CallArguments:
        """Run once and put a block's inputs in the student, and its outputs in the teacher, into a store.

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
        recorder = SampleRecorder(block, self.teacher, trace, evaluations, most, store, generator)

        def begin(*evaluation: Any) -> None:
            recorder.begin(self.trajectory, *evaluation)

        with removed(recorder.student_hooks(self.student)):
            self.drive(begin, recorder.end, generator)
        store.collect(recorder.keys, self.reducer)
        found = next((s for part in self.reducer.gather(recorder.arguments[:1]) for s in part), None)
        if found is None:
            raise no_data(block)
        return found

    def drive(
        self, begin: Callable[..., None], end: Callable[..., None], generator: torch.Generator | None = None
    ) -> None:
        """Run the student; call ``begin(index, args, kwargs)`` and ``end(args, kwargs, output)`` at each evaluation.

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
