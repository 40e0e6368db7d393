"""What is told about the trajectories and evaluations of a student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Listener:
    """Is told about the evaluations of a student; overrides what it wants to know.

    Compiled regions are listeners, and so is whatever records errors step by step.

    Attributes:
        copied: A copy of the student gets a copy of the listener.
    """

    copied = False

    def before_trajectory(self, state: Any) -> None:
        """A trajectory is about to be opened; may raise to refuse it."""

    def before_evaluation(self, state: Any, arguments: Sequence[Tensor]) -> None:
        """The denoiser is about to be called, inside a trajectory or outside of any.

        Args:
            state: Of the student: a :class:`modiff.trajectory.session.ModulationState`, as everywhere here.
            arguments: The tensors among the denoiser's arguments.
        """

    def after_evaluation(self, state: Any, output: Any) -> None:
        """The denoiser has returned, inside a trajectory; its calls are about to be counted."""

    def closed(self, state: Any) -> None:
        """The trajectory has ended, and its state is gone."""

    def moved(self, state: Any) -> None:
        """An operator was moved to another device, cast or laid out anew."""

    def removed(self, state: Any) -> None:
        """The student is being restored: nothing of the listener may stay on its modules."""
