"""Which modules of a denoiser are blocks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from modiff.operators.rewrites import RewrittenOperator


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
