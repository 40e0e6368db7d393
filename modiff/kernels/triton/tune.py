"""Tune the products on the GPU that is here: ``python -m modiff.kernels.triton.tune --rows ... --output table.json``.

Every candidate is checked against exact sums before it is timed. The fastest one of each shape goes into a copy of the
architecture's table, which ``--output`` writes: put it in place of the packaged one to use it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor, nn

from modiff.kernels.accumulate import accumulate
from modiff.kernels.backend import OperatorShape
from modiff.kernels.triton import launch, support
from modiff.kernels.triton.tables import COLUMN_PADDING, Blocks, Product, Table, architecture_of, table

SIZES = ((256, 128), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 32))
"""Rows and columns that are tried; a weight is padded to 128 columns, so that no block may have more."""


def candidates(product: Product) -> list[Blocks]:
    """Blocks that may suit a product.

    >>> len(candidates(Product(rows=8192, columns=256, depth=2304, run=768)))
    66
    """
    found = []
    for rows, columns in SIZES:
        if columns >= 2 * max(product.columns, 32):
            continue
        for depth in (128, 64, 32):
            if product.run % depth or (depth == 32 and product.run % 64 == 0):
                continue
            for warps in (4, 8):
                if rows * columns < 64 * 128 and warps == 8:
                    continue
                parts = max(rows * columns // (32 * warps * 32), 1)
                found += [
                    Blocks(rows, columns, depth, warps, stages, min(parts, columns // 16)) for stages in (2, 3, 4)
                ]
    return found


def operands(product: Product, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, weight and float16 output of a product: a Linear's, or those of a square image and kernel."""
    generator = torch.Generator().manual_seed(seed)
    columns = -(-product.columns // COLUMN_PADDING) * COLUMN_PADDING
    if product.run == product.depth:
        codes, weight = [product.rows, product.depth], [columns, product.depth]
        output = [product.rows, product.columns]
    else:
        kernel = product.depth // product.run
        channels, size = product.run // kernel, image_size(product.rows)
        batch = product.rows // size**2
        codes, weight = [batch, size + kernel - 1, size + kernel - 1, channels], [columns, kernel, kernel, channels]
        output = [batch, size, size, product.columns]
    made = [torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8) for shape in (codes, weight)]
    made[1][product.columns :] = 0
    return made[0].to(device), made[1].to(device), torch.randn(output, generator=generator).to(device, torch.float16)


def image_size(rows: int) -> int:
    """The largest power of two, at most 64, whose square divides the rows.

    >>> image_size(128 * 32 * 32), image_size(2 * 64 * 64)
    (64, 64)
    """
    size = 64
    while rows % (size * size):
        size //= 2
    return size


def check(product: Product, blocks: Blocks, device: torch.device) -> bool:
    """Whether the sums of a product are exact, in poisoned memory, on a part of it that float64 computes soon."""
    rows = min(product.rows, 2 * blocks.rows + 3) if product.run == product.depth else image_size(product.rows) ** 2
    codes, weight, output = operands(replace(product, rows=rows), device)
    sums = torch.full(output.shape, -77777, dtype=torch.int32, device=device)
    ones = torch.ones(product.columns, device=device)
    launch.product(sums, codes, weight, ones, None, None, 1, False, True, blocks)
    kept = weight[: product.columns]
    if codes.ndim == 2:
        expected = accumulate(codes, kept, OperatorShape("linear", product.depth, product.columns))
    else:
        kernel = kept.shape[1]
        sizes = {"kernel": (kernel, kernel), "stride": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)}
        shape = OperatorShape("conv", codes.shape[3], product.columns, None, **sizes)  # type: ignore[arg-type]
        expected = accumulate(codes.permute(0, 3, 1, 2), kept.permute(0, 3, 1, 2), shape).permute(0, 2, 3, 1)
    return torch.equal(sums.double(), expected)


def microseconds(product: Product, blocks: Blocks, device: torch.device) -> float:
    """Median time of a product that advances a float16 output."""
    codes, weight, output = operands(product, device)
    scale = torch.full((product.columns,), 1e-6, device=device)
    one = torch.ones(1, device=device)

    def run() -> None:
        launch.product(output, codes, weight, scale, one, None, 1, True, False, blocks)

    return 1000 * float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def tune(products: Iterable[Product], device: torch.device, start: Table) -> tuple[Table, list[dict[str, object]]]:
    """The fastest blocks of each product, and what was measured.

    Args:
        products: What is tuned.
        device: On which.
        start: The table that is completed.

    Returns:
        The table; one row for each product, with the time of the best blocks and of those that ``start`` gives.
    """
    shapes, rows = dict(start.shapes), []
    for product in products:
        times: dict[Blocks, float] = {}
        for blocks in dict.fromkeys([start.blocks(product), *candidates(product)]):
            try:
                if check(product, blocks, device):
                    times[blocks] = microseconds(product, blocks, device)
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
                continue  # more shared memory or registers than this GPU has
        if not times:
            raise RuntimeError(f"No blocks give the exact sums of {product} on {device}.")
        best = min(times, key=lambda blocks: times[blocks])
        shapes[product] = best
        usual = times.get(start.blocks(product))
        rows.append({"product": product, "blocks": best, "microseconds": times[best], "by_rule": usual})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return replace(start, shapes=shapes, device=name), rows


def products_of(model: nn.Module, *inputs: Tensor) -> list[Product]:
    """The products of a denoiser's Linears and Convs in one call, each once."""
    found: dict[Product, None] = {}

    def note(module: nn.Module, _args: object, output: Tensor) -> None:
        linear = isinstance(module, nn.Linear)
        weight = module.weight
        assert isinstance(weight, Tensor)
        columns, depth = weight.shape[0], weight[0].numel()
        run = depth if linear or weight.ndim < 4 else depth // weight.shape[2]
        rows = output.numel() // columns
        if columns % support.CHANNEL_MULTIPLE == 0 and weight.shape[1] % 32 == 0:
            found[Product(rows, columns, depth, run)] = None

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


def parse(text: str) -> Product:
    """A product from the command line.

    >>> parse("131072x256x2304/768")
    Product(rows=131072, columns=256, depth=2304, run=768)
    """
    sizes, _, run = text.partition("/")
    rows, columns, depth = (int(n) for n in sizes.split("x"))
    return Product(rows, columns, depth, int(run) if run else depth)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m modiff.kernels.triton.tune", description=__doc__)
    parser.add_argument("products", nargs="+", type=parse, help="rowsxcolumnsxdepth, or .../run for a convolution")
    parser.add_argument("--output", type=Path, default=None, help="where the table goes; nowhere by default")
    given = parser.parse_args(arguments)
    device = torch.device("cuda")
    problem = support.device_obstacle(device)
    if problem is not None:
        print(f"Nothing can be tuned here: {problem}.", file=sys.stderr)
        return 1
    architecture = architecture_of(torch.cuda.get_device_capability(device))
    assert architecture is not None
    found, rows = tune(given.products, device, table(architecture))
    for row in rows:
        print(row)
    if given.output is not None:
        given.output.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
