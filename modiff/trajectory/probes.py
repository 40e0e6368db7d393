"""Flags of a trajectory that stay on the device until it closes: NaN or Inf, and inputs overwritten unseen."""

from __future__ import annotations

import torch
from torch import Tensor

from modiff.errors import TrajectoryError

OUTPUT = "(output)"  # stands for the student's own output among the names of operators


class Probes:
    """Scalars by operator, of the evaluation in progress and, stacked, of all before it."""

    def __init__(self) -> None:
        self.inputs: list[tuple[str, Tensor]] = []
        self.changes: list[tuple[str, Tensor]] = []
        self._inputs: list[tuple[list[str], Tensor]] = []
        self._changes: list[tuple[list[str], Tensor]] = []

    def begin(self) -> None:
        """Start an evaluation."""
        self.inputs, self.changes = [], []

    def end(self, output: Tensor | None) -> None:
        """End an evaluation.

        Args:
            output: What the student returned, if that is a tensor. What is wrong in an inner operator shows at the next
                one; only the last one needs this.
        """
        if output is not None:
            self.inputs.append((OUTPUT, output.sum(dtype=torch.promote_types(output.dtype, torch.float32))))
        for found, kept in ((self.inputs, self._inputs), (self.changes, self._changes)):
            if found:
                device = found[0][1].device
                kept.append(([name for name, _ in found], torch.stack([probe.to(device) for _, probe in found])))
        self.begin()

    def clear(self) -> None:
        """Let go of everything."""
        self.__init__()  # type: ignore[misc]

    def check(self, evaluations: int) -> None:
        """Read the flags, once, and let go of them.

        Args:
            evaluations: Of the whole trajectory.

        Raises:
            TrajectoryError: NaN or Inf was met, or an input was overwritten in a way that PyTorch does not count.
        """
        inputs, changes = self._inputs, self._changes
        self.clear()
        found = first_flag([(names, ~torch.isfinite(probe)) for names, probe in inputs])
        if found:
            where = "the student's output" if found[0] == OUTPUT else f"the input of operator {found[0]!r}"
            raise TrajectoryError(
                f"NaN or Inf in {where}, first in evaluation {found[1]} of {evaluations} (from 0). "
                "The images of this trajectory are worthless: check the teacher in this dtype, or keep that operator "
                "in full precision by a rule."
            )
        found = first_flag(changes)
        if found:
            raise TrajectoryError(
                f"The input of operator {found[0]!r} was overwritten between evaluations in a way that PyTorch does "
                "not count (through .data, numpy or a kernel of your own), and was taken for unchanged: the images of "
                "this trajectory are wrong. Write to the tensor itself (copy_), or give a new tensor in each "
                "evaluation."
            )


def first_flag(flags: list[tuple[list[str], Tensor]]) -> tuple[str, int] | None:
    """First name whose flag is set, and its index in the list.

    Synchronizes with the device, once unless something is found.

    Args:
        flags: Names and a flag for each, by evaluation.
    """
    if not flags:
        return None
    bad = torch.stack([flag.any() for _, flag in flags]).tolist()
    if not any(bad):
        return None
    index = bad.index(True)
    names, flag = flags[index]
    return names[int(flag.int().argmax())], index
