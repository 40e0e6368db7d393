"""The state of a student: one trajectory at a time, owned, counted and cleared here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import TrajectoryError

ATTRIBUTE = "_modiff_state"
OUTPUT = "(output)"  # stands for the student's own output among the names of operators


@dataclass
class OperatorCache:
    """What one call site of a modulated operator keeps between evaluations.

    Args:
        a_hat: Reconstruction â of the input (without error compensation: the last input itself); shape of the input.
        o_hat: Output ô = A(â) + bias; shape of the output, dtype ``state_dtype``.
    """

    a_hat: Tensor
    o_hat: Tensor


@dataclass
class Trajectory:
    """Counts of one trajectory, from noise to image.

    Args:
        total: Denoiser calls.
        quantized: Calls in which every operator that quantizes activations quantized its input.
    """

    total: int = 0
    quantized: int = 0
    caches: dict[str, list[OperatorCache]] = field(default_factory=dict, repr=False)
    probes: list[tuple[list[str], Tensor]] = field(default_factory=list, repr=False)

    @property
    def state_bytes(self) -> int:
        """Bytes held for â and ô by all operators, for the whole batch."""
        tensors = [t for caches in self.caches.values() for cache in caches for t in (cache.a_hat, cache.o_hat)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def first_nonfinite(self) -> tuple[str, int] | None:
        """First operator and evaluation (from 0) whose input held NaN or Inf; ``OUTPUT`` for the student's own output.

        Synchronizes with the device, once unless something is found.
        """
        if not self.probes:
            return None
        good = torch.stack([torch.isfinite(probe).all() for _, probe in self.probes]).tolist()
        if all(good):
            return None
        evaluation = good.index(False)
        names, probe = self.probes[evaluation]
        return names[int(torch.isfinite(probe).int().argmin())], evaluation


class ModulationState:
    """What the operators of one student share: the open trajectory and the place in it.

    Every forward of the student's root module is one evaluation. An operator that is called several times within one
    evaluation (one weight, several call sites) keeps one cache for each call, in order.
    """

    def __init__(self) -> None:
        self.trajectory: Trajectory | None = None
        self._in_evaluation = False
        self._calls: dict[str, int] = {}
        self._first_calls: dict[str, int] | None = None
        self._quantized = [0, 0]
        self._probes: list[tuple[str, Tensor]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copying or pickling is allowed between trajectories only."""
        self.refuse_inside("copied or pickled")
        return ModulationState().__dict__.copy()

    def refuse_inside(self, what: str) -> None:
        """Raise where a trajectory is open.

        Raises:
            TrajectoryError: A trajectory is open.
        """
        if self.trajectory is not None:
            raise TrajectoryError(
                f"The student cannot be {what} inside a trajectory. Leave modiff.trajectory(...) first."
            )

    def open(self) -> Trajectory:
        """Start a trajectory.

        Raises:
            TrajectoryError: Another one is open on this student.
        """
        if self.trajectory is not None:
            raise TrajectoryError(
                "A trajectory is already open on this student; they can be neither nested nor concurrent. "
                "Close it first, or use a deepcopy of the student for each."
            )
        self.trajectory = Trajectory()
        self._in_evaluation = False
        self._first_calls = None
        return self.trajectory

    def close(self) -> None:
        """End the trajectory and free its state."""
        if self.trajectory is not None:
            self.trajectory.caches = {}
        self.trajectory = None
        self._in_evaluation = False
        self._scratch = {}
        self._probes = []

    def begin_evaluation(self, *_: Any) -> None:
        """Forward pre-hook of the root module."""
        if self.trajectory is None:
            return
        if self._in_evaluation:
            raise TrajectoryError(
                "The previous evaluation of this trajectory did not finish (it raised, or the student calls itself), "
                "so its state is unusable. Start a new trajectory."
            )
        self._in_evaluation = True
        self._calls = {}
        self._quantized = [0, 0]
        self._probes = []

    def end_evaluation(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the root module.

        Raises:
            TrajectoryError: A modulated operator was called more or less often than in the first evaluation.
        """
        run = self.trajectory
        if run is None:
            return
        if self._first_calls is None:
            self._first_calls = self._calls
        elif self._calls != self._first_calls:
            name = next(
                n for n in {**self._first_calls, **self._calls} if self._calls.get(n) != self._first_calls.get(n)
            )
            raise TrajectoryError(
                f"Operator {name!r} was called {self._calls.get(name, 0)} times in evaluation {run.total}, but "
                f"{self._first_calls.get(name, 0)} times in the first one: its state would go to the wrong call. "
                "Exclude it with Rule(..., skip=True)."
            )
        self._in_evaluation = False
        run.total += 1
        done, all_ = self._quantized
        run.quantized += int(all_ > 0 and done == all_)
        result = _first_tensor(output)
        if result is not None:
            # What is wrong in an inner operator shows at the next one; only the last one needs this.
            self._probes.append((OUTPUT, result.sum(dtype=torch.promote_types(result.dtype, torch.float32))))
        if self._probes:
            device = self._probes[0][1].device
            probes = torch.stack([probe.to(device) for _, probe in self._probes])
            run.probes.append(([name for name, _ in self._probes], probes))

    def next_cache(self, name: str, x: Tensor) -> OperatorCache | None:
        """The cache of this call of operator ``name``; None in its first evaluation.

        Raises:
            TrajectoryError: No trajectory is open, or the input's shape changed.
        """
        if self.trajectory is None or not self._in_evaluation:
            where = "a trajectory" if self.trajectory is None else "its student"
            raise TrajectoryError(
                f"Modulated operator {name!r} was called outside {where}: it would run without the state of the last "
                "evaluation. Wrap the sampling loop in `with modiff.trajectory(student):` and call the student itself."
            )
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        caches = self.trajectory.caches.get(name, [])
        if self.trajectory.total == 0:
            return None
        if call >= len(caches):
            raise TrajectoryError(
                f"Operator {name!r} is called more often in evaluation {self.trajectory.total} than in the first one. "
                "Exclude it with Rule(..., skip=True)."
            )
        cache = caches[call]
        if cache.a_hat.shape != x.shape:
            raise TrajectoryError(
                f"The input of operator {name!r} has shape {list(x.shape)} in evaluation {self.trajectory.total}, but "
                f"had {list(cache.a_hat.shape)} in the first one. Keep the batch through a trajectory; open a new "
                "one for another batch."
            )
        return cache

    def keep_cache(self, name: str, cache: OperatorCache) -> None:
        """Keep the cache of an operator's call in the first evaluation."""
        assert self.trajectory is not None
        self.trajectory.caches.setdefault(name, []).append(cache)

    def note(self, name: str, probe: Tensor, quantized: bool | None) -> None:
        """Record one call of an operator.

        Args:
            name: The operator.
            probe: A scalar that is NaN or Inf where the input holds either.
            quantized: Whether the input was quantized; None for operators that never do.
        """
        if self.trajectory is None:
            return
        self._probes.append((name, probe))
        if quantized is not None:
            self._quantized[0] += int(quantized)
            self._quantized[1] += 1

    def scratch(self, like: Tensor) -> Tensor:
        """Uninitialized memory in the shape, strides and dtype of a dense tensor, shared by all operators.

        It is valid until the next call; fresh memory for each residual would cost a page fault per 4 KiB.
        """
        key = (like.device, like.dtype)
        buffer = self._scratch.get(key)
        if buffer is None or buffer.numel() < like.numel():
            with torch.inference_mode(False):
                buffer = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
            self._scratch[key] = buffer
        return buffer.as_strided(like.shape, like.stride())


def state_of(student: nn.Module) -> ModulationState:
    """The state of a student.

    Raises:
        TrajectoryError: The module is not a student.
    """
    state = getattr(student, ATTRIBUTE, None)
    if not isinstance(state, ModulationState):
        raise TrajectoryError(
            f"{type(student).__name__} is not a student. Call modiff.quantize(model, config) first, and pass the "
            "module that it returned."
        )
    return state


@contextmanager
def trajectory(student: nn.Module) -> Iterator[Trajectory]:
    """One batch of images from noise to image: owns and clears all state; gradients are off inside.

    Each forward of ``student`` inside is one evaluation, the first one the warm-up. Every trajectory starts afresh.

    Args:
        student: What :func:`modiff.quantize` returned.

    Yields:
        Counts of evaluations, to be read during and after the trajectory.

    Raises:
        TrajectoryError: A trajectory is already open; or, when it closes, NaN or Inf was met: the message names the
            first operator and evaluation.
    """
    state = state_of(student)
    run = state.open()
    try:
        with torch.no_grad():
            yield run
    finally:
        state.close()
    found = run.first_nonfinite()
    if found:
        where = "the student's output" if found[0] == OUTPUT else f"the input of operator {found[0]!r}"
        raise TrajectoryError(
            f"NaN or Inf in {where}, first in evaluation {found[1]} of {run.total} (from 0). "
            "The images of this trajectory are worthless: check the teacher in this dtype, or keep that operator in "
            "full precision by a rule."
        )


def _first_tensor(output: Any) -> Tensor | None:
    """The first tensor of what a denoiser returned: itself, or a member of a tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output
    members = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((member for member in members if isinstance(member, Tensor)), None)


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized dense memory in the shape and layout of ``x``, usable in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty_like(x, dtype=dtype)
