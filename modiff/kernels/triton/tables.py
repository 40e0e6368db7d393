"""The tuned tables: how a product is cut on which architecture. They are data files; nothing is tuned at run time."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
"""Those with a table of their own; see :func:`architecture_of` for the others."""
SHARED_PER_BLOCK = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448}
"""Bytes of shared memory that one block may have."""
SHARED_PER_SM = {"sm_80": 167936, "sm_89": 102400, "sm_90": 233472}
"""Bytes of shared memory of a multiprocessor; each block takes 1024 more than it asks for."""
REGISTERS_PER_SM = 65536
THREADS_PER_SM = {"sm_80": 2048, "sm_89": 1536, "sm_90": 2048}
COLUMN_PADDING = 128
"""Columns of a weight are padded to a multiple of this, so that no block of a product reads beyond it."""


@dataclass(frozen=True)
class Blocks:
    """How a product is cut.

    Args:
        rows: Of the output that one block makes.
        columns: Likewise.
        depth: Codes of each row that one trip of the main loop reads.
        warps: Of a block.
        stages: Trips of the main loop that are loaded ahead.
        parts: In which the block's output is written.
        group: Blocks of rows that run side by side on the same columns.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    parts: int = 1
    group: int = 8

    @property
    def key(self) -> str:
        """For messages and tables."""
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Product:
    """What decides about the blocks of a product.

    Args:
        rows: Of the output: tokens, or pixels of all images.
        columns: Output channels.
        depth: Of the sums.
        run: Codes that lie next to each other in memory: all of a Linear's, one row of a convolution's kernel.
    """

    rows: int
    columns: int
    depth: int
    run: int


@dataclass(frozen=True)
class Table:
    """The blocks for one architecture.

    Args:
        architecture: Such as ``sm_90``.
        rules: ``(least rows, least columns, blocks)`` in the order in which they are asked.
        shapes: Blocks that were measured to be the fastest for a product.
        elements: Of a tensor that one program of an element-wise kernel handles.
        warps: Of such a program.
        device: On which ``shapes`` were measured; None: nowhere.
    """

    architecture: str
    rules: tuple[tuple[int, int, Blocks], ...]
    shapes: dict[Product, Blocks]
    elements: int = 4096
    warps: int = 4
    device: str | None = None

    def blocks(self, product: Product) -> Blocks:
        """The blocks for a product: as measured, else by the first rule that fits.

        >>> table("sm_90").blocks(Product(rows=131072, columns=256, depth=2304, run=768)).key
        '128x128x128, 4 warps, 3 stages'
        """
        known = self.shapes.get(product)
        if known is not None:
            return known
        for rows, columns, blocks in self.rules:
            if product.rows >= rows and product.columns >= columns and product.run % blocks.depth == 0:
                return blocks
        raise ValueError(f"No rule of the table for {self.architecture} fits {product}; the last one must fit all.")

    def warps_for(self, elements: int) -> int:
        """Warps of an element-wise program: more than usual where a row that must stay whole has more elements.

        >>> [table("sm_90").warps_for(elements) for elements in (2048, 4096, 8192, 16384)]
        [4, 8, 8, 8]
        """
        return min(max(self.warps * elements // self.elements, self.warps), 8)

    def every(self) -> tuple[Blocks, ...]:
        """All blocks that may run, each once."""
        return tuple(dict.fromkeys([blocks for *_, blocks in self.rules] + list(self.shapes.values())))

    def to_json(self) -> dict[str, Any]:
        """As in the data file."""
        return {
            "architecture": self.architecture,
            "device": self.device,
            "elements": self.elements,
            "warps": self.warps,
            "rules": [{"rows": rows, "columns": columns, "blocks": asdict(b)} for rows, columns, b in self.rules],
            "shapes": [{"product": asdict(product), "blocks": asdict(b)} for product, b in self.shapes.items()],
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Table:
        """The inverse of :meth:`to_json`."""
        rules = tuple((rule["rows"], rule["columns"], Blocks(**rule["blocks"])) for rule in found["rules"])
        shapes = {Product(**entry["product"]): Blocks(**entry["blocks"]) for entry in found["shapes"]}
        return cls(found["architecture"], rules, shapes, found["elements"], found["warps"], found["device"])


@functools.cache
def table(architecture: str) -> Table:
    """The packaged table of an architecture, one of :data:`ARCHITECTURES`."""
    file = resources.files("modiff.kernels.triton") / "tables" / f"{architecture}.json"
    return Table.from_json(json.loads(file.read_text(encoding="utf-8")))


def architecture_of(capability: tuple[int, int]) -> str | None:
    """The table for a compute capability; None: it is too old for int8 tensor cores that Triton uses.

    Ampere's and Blackwell's gaming chips have the shared memory of ``sm_89``; Blackwell's large ones have that of
    ``sm_90``, but not its instructions, so they take the blocks of ``sm_80``.

    >>> [architecture_of(c) for c in ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))]
    [None, 'sm_80', 'sm_89', 'sm_90', 'sm_80', 'sm_89']
    """
    if capability < (8, 0):
        return None
    known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_80", (10, 3): "sm_80"}
    return known.get(capability, "sm_89")
