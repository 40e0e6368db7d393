"""Blocks of a student that are skipped in some evaluations: their residual branch is reused or extrapolated.

Operators inside a skipped block keep â and ô. By equation (13) the next difference is taken to â, so whatever was
skipped is in it, and no error is added beyond that of the branch itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from modiff.config.schedule import ReuseSchedule
from modiff.errors import TrajectoryError
from modiff.operators.modulated import ModulatedOperator
from modiff.student.blocks import residual_blocks, reusable_blocks
from modiff.trajectory.cache import BranchCache
from modiff.trajectory.graphs import outside
from modiff.trajectory.schedule import Answer
from modiff.trajectory.session import Listener, ModulationState, tensors_of


@dataclass
class BlockReuse(Listener):
    """Decides block by block and evaluation by evaluation; see :class:`modiff.config.schedule.ReuseSchedule`.

    Args:
        schedule: Which blocks, in which evaluations.
        blocks: The blocks that the schedule may skip, by name.
        root: The student itself, whose second argument is the time step.
        residual: Names of those blocks that add a branch to their input; of the others the whole output is kept.
    """

    schedule: ReuseSchedule
    blocks: Mapping[str, nn.Module]
    root: nn.Module
    residual: frozenset[str] = frozenset()
    shortcuts: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    time: Tensor | None = None
    state: ModulationState | None = None
    reused: bool = False
    copied = True

    def __str__(self) -> str:
        plan, names = self.schedule, list(self.blocks)
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        between = "extrapolated" if plan.mode == "extrapolate" else "reused"
        if plan.every is not None:
            how = f"computed in every {_ordinal(plan.every)} evaluation and {between} between"
        elif plan.threshold is not None:
            how = f"{between} while their input changes by less than {plan.threshold:g} (depends on the batch)"
        else:
            pairs = sum(len(times) for _, times in plan.skipped or ())
            how = f"{between} in {pairs} calibrated pairs of block and evaluation"
        return f"{len(names)} blocks are {how}: {listed}"

    def install(self, state: ModulationState) -> list[torch.utils.hooks.RemovableHandle]:
        """Stand before the blocks' forwards.

        Returns:
            Hooks that :func:`modiff.restore` removes.
        """
        hooks = [self.root.register_forward_pre_hook(self.note_time, with_kwargs=True)]
        for name, block in self.blocks.items():
            block.forward = functools.partial(self.forward, name)
            shortcut = getattr(block, "conv_shortcut", None)
            if isinstance(shortcut, nn.Module):
                hooks.append(shortcut.register_forward_hook(functools.partial(self.note_shortcut, name)))
            for module in block.modules():
                if isinstance(module, ModulatedOperator) and module is not shortcut:
                    module.block = name  # its â is advanced with the block, so only operators of the block may share it
        state.listeners.append(self)
        return hooks

    def note_time(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the student: the time step of this evaluation."""
        if torch.compiler.is_compiling():
            outside(self.note_time, _, args, kwargs)
            return
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if isinstance(given, Tensor):
            self.time = given.detach().flatten()[0].float() if given.numel() else None
        else:
            self.time = torch.tensor(float(given)) if isinstance(given, (int, float)) else None

    def note_shortcut(self, name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        """Forward hook of a block's shortcut convolution, which runs in every evaluation."""
        self.shortcuts[name] = output

    @override
    def before_evaluation(self, state: ModulationState, arguments: Sequence[Tensor]) -> None:
        """Count the calls of each block anew."""
        self.state, self.reused = state, False
        self.calls.clear()

    @override
    def after_evaluation(self, state: ModulationState, output: Any) -> None:
        """Count an evaluation in which any block was skipped."""
        assert state.trajectory is not None
        state.trajectory.current.reused += int(self.reused)
        self.shortcuts.clear()

    @override
    def closed(self, state: ModulationState) -> None:
        """Let go of the trajectory that ended, and refuse one that was shorter than the schedule's."""
        self.state = self.time = None
        self.shortcuts.clear()

    @override
    def removed(self, state: ModulationState) -> None:
        """Give the blocks their own forwards back."""
        for block in self.blocks.values():
            vars(block).pop("forward", None)

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block: computed, or put together from its shortcut and its kept branch.

        Raises:
            TrajectoryError: The student was called outside of a trajectory, the trajectory is longer than the schedule,
                or the batch changed.
        """
        if torch.compiler.is_compiling():
            return outside(self.forward, name, *args, **kwargs)
        block = self.blocks[name]
        run = None if self.state is None else self.state.trajectory
        if self.state is None or run is None or not run.in_evaluation:
            raise TrajectoryError(
                f"Block {name!r} has a reuse schedule and was called outside a trajectory. Wrap the sampling loop in "
                "`with modiff.trajectory(student):` and call the student itself."
            )
        evaluation, length = self.state.evaluation, self.schedule.length
        if length is not None and evaluation >= length:
            raise TrajectoryError(
                f"The trajectory is longer than the reuse schedule, which was made for {length} evaluations. Sample "
                "with as many steps, or calibrate the schedule with more."
            )
        site, self.calls[name] = self.calls[name], self.calls[name] + 1
        caches = run.current.branches.setdefault(name, [])
        while len(caches) <= site:
            caches.append(BranchCache())
        cache = caches[site]
        x = next(tensors_of((args, kwargs)))
        cache.fit(x, run.guidance_may_end, name)
        if self.state.schedule.block(self.schedule, name, evaluation, cache, x) is Answer.COMPUTE:
            return self._compute(name, block, cache, args, kwargs)
        self.reused = True
        self.state.calls.update({op: self.state.calls.get(op, 0) + n for op, n in cache.calls.items()})
        return self._put_together(name, block, cache, args, kwargs)

    def _compute(
        self, name: str, block: nn.Module, cache: BranchCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the block; keep what it adds to its shortcut."""
        assert self.state is not None
        before = Counter(self.state.calls)
        inputs = [*tensors_of((args, kwargs))]
        output = type(block).forward(block, *args, **kwargs)
        shortcut = getattr(block, "conv_shortcut", None)
        made = Counter(self.state.calls) - before
        if isinstance(shortcut, nn.Module):
            made.pop(getattr(shortcut, "name", ""), None)  # it also runs where the block is skipped
        cache.calls = dict(made)
        leaves, cache.structure = tree_flatten(output)
        bases = [self._base(name, block, leaf, inputs) for leaf in leaves]
        cache.sources = tuple(source for source, _ in bases)
        scale = _scale(block)
        branches = tuple(
            leaf
            if not isinstance(leaf, Tensor)
            else leaf.clone()
            if base is None
            else (leaf if scale == 1 else leaf * scale) - base
            for leaf, (_, base) in zip(leaves, bases, strict=True)
        )
        cache.keep(branches, self.time, self.state.evaluation, both=self.schedule.mode == "extrapolate")
        if self.schedule.threshold is not None:
            cache.input = inputs[0].clone()
        return output

    def _base(self, name: str, block: nn.Module, leaf: Any, inputs: list[Tensor]) -> tuple[str | int | None, Any]:
        """What an output is added to: its shortcut, or the one input of its shape; with where to find it again."""
        if not isinstance(leaf, Tensor) or name not in self.residual:
            return None, None
        if getattr(block, "conv_shortcut", None) is not None:
            resampled = getattr(block, "upsample", None) is not None or getattr(block, "downsample", None) is not None
            return (None, None) if resampled else ("shortcut", self.shortcuts[name])
        same = [i for i, x in enumerate(inputs) if x.shape == leaf.shape and x.dtype == leaf.dtype]
        return (same[0], inputs[same[0]]) if len(same) == 1 else (None, None)

    def _put_together(
        self, name: str, block: Any, cache: BranchCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of a skipped block."""
        inputs = [*tensors_of((args, kwargs))]
        branches = cache.branches(self.schedule.mode, self.time, self.state.evaluation if self.state else 0)
        scale, leaves = _scale(block), []
        for source, branch in zip(cache.sources, branches, strict=True):
            if source is None:
                leaves.append(branch.clone() if isinstance(branch, Tensor) else branch)
                continue
            base = block.conv_shortcut(inputs[0]) if source == "shortcut" else inputs[source]
            leaves.append(base + branch if scale == 1 else (base + branch) / scale)
        return tree_unflatten(leaves, cache.structure)


def install_schedule(
    model: nn.Module, schedule: ReuseSchedule, state: ModulationState
) -> list[torch.utils.hooks.RemovableHandle]:
    """Let a schedule skip the blocks of a student.

    Returns:
        Hooks that :func:`modiff.restore` removes.

    Raises:
        ConfigError: The schedule names no block that the model has.
    """
    found = reusable_blocks(model, schedule)
    residual = frozenset(found) & frozenset(residual_blocks(model))
    return BlockReuse(schedule, found, model, residual).install(state)


def reuse_of(state: ModulationState) -> BlockReuse | None:
    """The block reuse of a student with this state; None where its configuration has no schedule."""
    return next((listener for listener in state.listeners if isinstance(listener, BlockReuse)), None)


def _scale(block: nn.Module) -> float:
    """What a block divides its sum by."""
    for name in ("output_scale_factor", "rescale_output_factor"):
        value = getattr(block, name, None)
        if isinstance(value, (int, float)):
            return float(value)
    return 1.0


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")
