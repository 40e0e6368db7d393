"""Which blocks of a denoiser are computed in which evaluation, and what stands in for them in the others."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from modiff.errors import ConfigError

ReuseMode = Literal["reuse", "extrapolate"]


@dataclass(frozen=True)
class ReuseSchedule:
    """Blocks whose residual branch is computed in some evaluations only.

    In an evaluation that skips a block, its branch is the last computed one (``reuse``), or the line through the last
    two in the time step (``extrapolate``). Operators inside keep â and ô: by equation (13), what was skipped is in the
    next difference. Which evaluations skip does not depend on the images, unless ``threshold`` is given.

    Args:
        every: Compute each block in every ``every``-th evaluation.
        mode: What stands in for a skipped branch.
        part: ``branches``: the residual branch of every resnet, attention and transformer block; ``deep``: the whole
            deeper half of a UNet, as in DeepCache.
        blocks: Patterns of block names; the others are always computed.
        warmup: Evaluations at the beginning of a trajectory in which everything is computed; at least 1, and 2 for
            ``extrapolate``.
        cooldown: Evaluations at the end in which everything is computed; they need ``length``.
        length: Evaluations of the trajectories that the schedule was made for; None: any.
        skipped: Skipped evaluations (from 0) by block name, found by a calibration; it replaces ``every``.
        threshold: Skip a block while its input has changed by less than this share (relative L2, the whole batch)
            since it was last computed; it replaces ``every``. Images then depend on the batch they are drawn in, and
            every evaluation waits for the device.

    Raises:
        ConfigError: A field is wrong, or two of ``every``, ``skipped`` and ``threshold`` are given.

    >>> schedule = ReuseSchedule(every=2)
    >>> [schedule.skips("mid_block", t) for t in range(6)]
    [False, False, False, True, False, True]
    """

    every: int | None = None
    mode: ReuseMode = "extrapolate"
    part: Literal["branches", "deep"] = "branches"
    blocks: tuple[str, ...] = ("*",)
    warmup: int = 2
    cooldown: int = 0
    length: int | None = None
    skipped: tuple[tuple[str, tuple[int, ...]], ...] | None = field(default=None)
    threshold: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("every", "skipped", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"A reuse schedule has {' and '.join(given) or 'neither every, skipped nor threshold'}; give one of "
                "every, skipped and threshold."
            )
        if self.mode not in get_args(ReuseMode):
            raise ConfigError(f"mode is {self.mode!r}; allowed are {', '.join(get_args(ReuseMode))}.")
        if self.part not in ("branches", "deep"):
            raise ConfigError(f"part is {self.part!r}; allowed are branches, deep.")
        for name, low in (("every", 2), ("warmup", 2 if self.mode == "extrapolate" else 1), ("cooldown", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ConfigError(f"{name} is {value!r}; allowed are whole numbers, {low} or more.")
        if self.length is not None and (isinstance(self.length, bool) or not isinstance(self.length, int)):
            raise ConfigError(f"length is {self.length!r}; give the evaluations of a trajectory.")
        if self.cooldown and self.length is None:
            raise ConfigError("cooldown needs length: the end of a trajectory is not known otherwise. Set length.")
        if self.threshold is not None and not (
            isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool) and self.threshold > 0
        ):
            raise ConfigError(f"threshold is {self.threshold!r}; give a positive share, such as 0.02.")
        patterns = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigError(f"blocks is {self.blocks!r}; give patterns of block names, such as ['down_blocks.*'].")
        object.__setattr__(self, "blocks", patterns)
        if self.skipped is not None:
            self._check_skipped()

    def _check_skipped(self) -> None:
        """Make the table hashable, and refuse what no trajectory can follow."""
        assert self.skipped is not None
        rows = self.skipped.items() if isinstance(self.skipped, dict) else self.skipped
        try:
            table = tuple((str(name), tuple(int(t) for t in times)) for name, times in rows)
        except (TypeError, ValueError):
            raise ConfigError(f"skipped is {self.skipped!r}; give evaluations by block name.") from None
        object.__setattr__(self, "skipped", table)
        for name, times in table:
            early = [t for t in times if t < self.warmup]
            if early:
                raise ConfigError(
                    f"skipped names evaluation {early[0]} of block {name!r}, but the first {self.warmup} (warmup) are "
                    "always computed."
                )
            late = [t for t in times if self.length is not None and t >= self.length]
            if late:
                raise ConfigError(
                    f"The schedule is longer than the sampler: skipped names evaluation {late[0]} of block {name!r}, "
                    f"and a trajectory has {self.length}. Calibrate with as many steps as you sample."
                )

    @classmethod
    def preset(cls, name: str) -> ReuseSchedule:
        """A schedule by name: ``reuse-K`` or ``extrapolate-K``, K from 2 to 9; ``deep-`` before it for the deep half.

        Raises:
            ConfigError: The name is not of that form.

        >>> ReuseSchedule.preset("extrapolate-3").every
        3
        """
        match = re.fullmatch(r"(deep-)?(reuse|extrapolate)-([2-9])", name) if isinstance(name, str) else None
        if match is None:
            raise ConfigError(
                f"unknown schedule {name!r}; allowed are reuse-K and extrapolate-K with K from 2 to 9, such as "
                "'extrapolate-2', and the same for the deep half of a UNet: 'deep-reuse-2'."
            )
        mode: ReuseMode = "reuse" if match[2] == "reuse" else "extrapolate"
        return cls(every=int(match[3]), mode=mode, part="deep" if match[1] else "branches")

    def matches(self, block: str) -> bool:
        """Whether a block, by its qualified name, is one of those that may be skipped."""
        if self.skipped is not None:
            return any(name == block and times for name, times in self.skipped)
        return any(fnmatchcase(block, pattern) for pattern in self.blocks)

    def skips(self, block: str, evaluation: int) -> bool:
        """Whether a static schedule skips a block in an evaluation, counted from 0 in each context."""
        if self.skipped is not None:
            return any(name == block and evaluation in times for name, times in self.skipped)
        if self.every is None or not self.matches(block) or evaluation < self.warmup:
            return False
        if self.length is not None and evaluation >= self.length - self.cooldown:
            return False
        return (evaluation - self.warmup) % self.every != 0

    def check_length(self, evaluations: int) -> None:
        """Refuse a sampler of another length than the schedule's.

        Raises:
            ConfigError: They differ.
        """
        if self.length is not None and self.length != evaluations:
            raise ConfigError(
                f"The reuse schedule was made for trajectories of {self.length} evaluations, and the sampler makes "
                f"{evaluations}. Calibrate the schedule with as many steps as you sample, or use every."
            )

    def computed_share(self, block: str, evaluations: int) -> float:
        """Share of a trajectory's evaluations in which a block is computed; 1 for a dynamic schedule."""
        if evaluations < 1:
            return 1.0
        return 1 - sum(self.skips(block, t) for t in range(evaluations)) / evaluations

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReuseSchedule:
        """Build from a plain dictionary.

        Raises:
            ConfigError: A field is unknown or wrong.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"schedule: {error}. Its fields are {', '.join(cls.__dataclass_fields__)}.") from None
