"""Agreement of the processes that share a calibration: one by itself, or several by torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from typing_extensions import override

from modiff.errors import CalibrationError, ModiffError

Result = TypeVar("Result")


class Reducer:
    """One process: what it has is all there is."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor, how: str) -> Tensor:
        """Reduce a tensor over all processes by ``sum``, ``min`` or ``max``; all get the same bits."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank, in each of them."""
        return [value]

    def each(self, function: Callable[[], Result]) -> Result:
        """Call a function in every process. The error of one is raised in all, so that none waits for it."""
        return function()

    def once(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process only; all get its result, or raise its error."""
        return function()


class TorchReducer(Reducer):
    """The processes of torch.distributed's default group, whatever its backend.

    Raises:
        CalibrationError: There is no such group.
    """

    def __init__(self) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            raise CalibrationError("There is no process group. Call torch.distributed.init_process_group first.")
        self.rank = distributed.get_rank()
        self.world_size = distributed.get_world_size()

    @override
    def all_reduce(self, tensor: Tensor, how: str) -> Tensor:
        ops = {"sum": distributed.ReduceOp.SUM, "min": distributed.ReduceOp.MIN, "max": distributed.ReduceOp.MAX}
        # NCCL takes tensors of the GPU only.
        device = torch.device("cuda") if distributed.get_backend() == "nccl" else torch.device("cpu")
        shared = tensor.detach().to(device, copy=True).contiguous()
        distributed.all_reduce(shared, ops[how])
        return shared.to(tensor.device)

    @override
    def gather(self, value: Any) -> list[Any]:
        # The values travel as pickles, tensors best on the CPU.
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, value)
        return found

    @override
    def each(self, function: Callable[[], Result]) -> Result:
        result, error = self._attempt(function)
        for rank, other in enumerate(self.gather(_portable(error))):
            if other is not None:
                raise (error if error is not None and rank == self.rank else other)
        return result  # type: ignore[return-value]

    @override
    def once(self, function: Callable[[], Result]) -> Result:
        result, error = self._attempt(function) if self.rank == 0 else (None, None)
        box = [(result, _portable(error))]
        distributed.broadcast_object_list(box, src=0)
        if box[0][1] is not None:
            raise (error if error is not None else box[0][1])
        return result if self.rank == 0 else box[0][0]  # type: ignore[return-value]

    def _attempt(self, function: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
        try:
            return function(), None
        except Exception as error:  # of any kind: the others have to hear of it
            return None, error


def _portable(error: Exception | None) -> ModiffError | None:
    """Return an error that can be pickled: those of this library as they are, others by what they say."""
    if error is None or isinstance(error, ModiffError):
        return error
    return CalibrationError(f"Another process of this calibration failed: {type(error).__name__}: {error}")
