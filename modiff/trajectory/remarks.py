"""What a user should know after a trajectory, said once for each student, by Python's logging."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from modiff.trajectory.contexts import Trajectory

LOGGER = logging.getLogger("modiff")
COMPILED = (
    "This student, or a part of it, was compiled by torch.compile. Its operators run outside of those graphs, because "
    "they keep a state between evaluations: the numbers are right, but little is gained. Use modiff.compile(student)."
)


class Remarks:
    """Looks at trajectories that ended well; says each thing once."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self._muted = False

    def after(self, run: Trajectory, names: set[str], called: set[str]) -> None:
        """Look at a trajectory.

        Args:
            run: It has ended.
            names: Of the student's operators.
            called: Those that were called.
        """
        if run.total == 0 or self._muted:
            return
        uncalled = sorted(names - called)
        if uncalled:
            listed = ", ".join(map(repr, uncalled[:5])) + (
                f" and {len(uncalled) - 5} more" if len(uncalled) > 5 else ""
            )
            self.say(
                "uncalled",
                f"Never called in this trajectory, so that their inputs were not quantized: {listed}. Their module is "
                "not used, or other code multiplies by their weight itself.",
            )
        if run.stateful and run.quantized == 0 and all(context.total == 1 for context in run.contexts.values()):
            self.say(
                "warm-up",
                "All evaluations of this trajectory were warm-ups, in which activations are in full precision. With so "
                "few steps use Modulation(warmup='refine'), whose first evaluation is quantized too.",
            )

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Say nothing of the trajectories inside."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def say(self, key: str, text: str) -> None:
        """Say something that was not said yet.

        Args:
            key: Of what is said once.
            text: A whole line.
        """
        if key not in self.said:
            self.said.add(key)
            LOGGER.warning(text)
