"""Blocks of a denoiser: modules that repeat, and the smallest ones that hold several operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from modiff.config.schedule import ReuseSchedule
from modiff.errors import ConfigError
from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.rewrites import RewrittenOperator
from modiff.trajectory.schedule import Schedule


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules of a class that occurs at least twice, each holding several quantized operators and no other such module.

    Where the model names its repeated blocks itself (``_repeated_blocks``, as diffusers' do), those.

    Raises:
        ConfigError: There are none.
    """
    named = set(getattr(model, "_repeated_blocks", None) or ())
    held = {m: sum(isinstance(x, QuantizedOperator) for x in m.modules()) for m in model.modules() if m is not model}
    usual = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    # The halves of one operator belong to the block around it.
    several = [m for m, count in held.items() if count > 1 and not isinstance(m, (*usual, RewrittenOperator))]
    if named:
        several = [m for m in several if type(m).__name__ in named]
    counts = Counter(type(m) for m in several)
    found = [m for m in several if counts[type(m)] > 1]
    found = [m for m in found if not any(other is not m and _contains(m, other) for other in found)]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks: no class of modules with several operators occurs twice. "
            "Use mode 'stages' or 'whole'."
        )
    return found


RESIDUAL_BLOCKS = ("ResnetBlock", "TransformerBlock", "Attention", "AttentionBlock", "ResBlock", "TemporalBlock")
"""Ends of the names of classes whose output is their input (or a shortcut of it) and a branch."""


def reusable_blocks(model: nn.Module, schedule: ReuseSchedule) -> dict[str, nn.Module]:
    """The blocks that a reuse schedule skips, outermost ones only: residual blocks, or the deep half of a UNet.

    Where patterns match no residual block, they may name other modules, whose whole output is then kept.

    Args:
        model: Teacher or student.
        schedule: Says which of them.

    Raises:
        ConfigError: There are none, or a name that the schedule was calibrated for is missing.
    """
    found = deep_half(model) if schedule.part == "deep" else residual_blocks(model)
    everything = dict(model.named_modules())
    if schedule.skipped is not None:
        missing = [name for name, _ in schedule.skipped if name not in everything]
        if missing:
            raise ConfigError(
                f"The reuse schedule names block {missing[0]!r}, which {type(model).__name__} does not have. Calibrate "
                "the schedule for this model."
            )
        return {name: everything[name] for name, times in schedule.skipped if times}
    chosen = {name: module for name, module in found.items() if schedule.matches(name)}
    if not chosen and schedule.blocks != ("*",):
        chosen = {name: module for name, module in everything.items() if name and schedule.matches(name)}
        chosen = {n: m for n, m in chosen.items() if not any(n.startswith(f"{other}.") for other in chosen)}
    if not chosen:
        names = list(found)
        raise ConfigError(
            f"schedule.blocks {list(schedule.blocks)} matches no block of {type(model).__name__}. "
            + (f"Its blocks are {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}." if names else "")
            + ("" if names else "It has no residual blocks that are known here: name modules, such as 'layers.*'.")
        )
    return chosen


def residual_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost resnet, attention and transformer blocks by name, found by the names of their classes."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        kind = type(module).__name__.removesuffix("2D").removesuffix("1D").removesuffix("3D").removesuffix("CondNorm")
        if kind.endswith(RESIDUAL_BLOCKS) and next(module.parameters(), None) is not None:
            found[name] = module
    return found


def deep_half(model: nn.Module) -> dict[str, nn.Module]:
    """The deeper resolutions of a UNet, whose outputs are kept whole (as in DeepCache)."""
    down, up = getattr(model, "down_blocks", None), getattr(model, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        return {}
    first = max(len(down) // 2, 1)
    names = [f"down_blocks.{i}" for i in range(first, len(down))]
    names += ["mid_block"] if isinstance(getattr(model, "mid_block", None), nn.Module) else []
    names += [f"up_blocks.{i}" for i in range(len(up) - first)]
    return {name: model.get_submodule(name) for name in names}


def _contains(module: nn.Module, other: nn.Module) -> bool:
    return any(m is other for m in module.modules())


def find_blocks(
    model: nn.Module, operators: Iterable[str], usable: Iterable[str], most: int = 8
) -> dict[str, tuple[str, ...]]:
    """The smallest modules that hold several operators: residual blocks, attentions, feed-forward nets, embeddings.

    Nothing is assumed about classes: a module is a block when it can be run alone (``usable``), holds 2 to ``most``
    operators, and no other block. The model itself is none.

    Args:
        model: The teacher.
        operators: Names of those whose weights are quantized.
        usable: Modules that were called once in each evaluation, with tensors of the batch in and one tensor out.
        most: Largest number of operators in a block.

    Returns:
        Operators by block; those in none stand alone.
    """
    names, possible = list(operators), set(usable)
    blocks: dict[str, tuple[str, ...]] = {}
    # Deepest first, so that a module is looked at after all that it holds.
    for name in sorted(possible - {""}, key=lambda n: -n.count(".")):
        held = tuple(op for op in names if op.startswith(f"{name}."))
        inside = any(block.startswith(f"{name}.") for block in blocks)
        if isinstance(model.get_submodule(name), RewrittenOperator):
            continue  # two halves of one operator, which belongs to the block around it
        if not inside and name not in names and 2 <= len(held) <= most:
            blocks[name] = held
    return blocks


def prompt_modules(model: nn.Module, schedule: Schedule) -> Iterator[str]:
    """Children of a student that only carry a fixed prompt to the operators behind them (trap 10)."""
    for name, module in model.named_children():
        modulations = [m.modulation for m in module.modules() if isinstance(m, ModulatedOperator)]
        if schedule.keeps_output(name, type(module).__name__, modulations):
            yield name
