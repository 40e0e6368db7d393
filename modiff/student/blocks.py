"""Blocks of a denoiser: modules that repeat, and the smallest ones that hold several operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

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
