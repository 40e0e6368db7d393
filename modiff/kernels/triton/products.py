"""The products: int8 codes times int8 weights in tensor cores, with ``ô += scale · weight scale · sum`` at their end.

Triton waits after every int8 wgmma of sm_90, so what hides the latency is a second block on the same multiprocessor:
the tuned tables keep registers and shared memory small enough for two. Trip counts are arguments, since constants would
be unrolled into spills. See :func:`modiff.kernels.triton.launch.product` for the arguments of both kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

# fmt: off


@triton.jit
def halves(block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a block."""
    return tl.split(tl.permute(tl.reshape(block, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def finish_part(sums, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row, first_column,
                ADDS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write some columns of a block of the output."""
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    corner = output + first_row.to(tl.int64) * columns
    out = corner + (tl.arange(0, ROWS) * columns)[:, None] + column[None, :]
    if SUMS:
        tl.store(out, sums, inside)
    else:
        total = sums.to(tl.float32) * tl.load(weight_scale + column, column < columns, 0.0)[None, :]
        if code_scale is not None:
            total = total * tl.load(code_scale + row // rows_per_scale, row < rows, 0.0)[:, None]
        if bias is not None:
            total = total + tl.load(bias + column, column < columns, 0.0)[None, :]
        if ADDS:
            total = total + tl.load(out, inside, 0.0).to(tl.float32)
        tl.store(out, total.to(output.dtype.element_ty), inside)


@triton.jit
def finish(sums, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row, first_column,
           ADDS: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a block of the output, a part of its columns at a time: what is added to needs registers of its own."""
    if PARTS == 1:
        finish_part(sums, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row,
                    first_column, ADDS, SUMS, ROWS, COLUMNS)
    else:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = halves(sums, ROWS, COLUMNS)
        finish(left, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row, first_column,
               ADDS, SUMS, PARTS // 2, ROWS, HALF)
        finish(right, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row,
               first_column + HALF, ADDS, SUMS, PARTS // 2, ROWS, HALF)


@triton.jit
def block_of(rows, columns, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of this program's block: GROUP blocks of rows read the same columns side by side."""
    program = tl.program_id(0)
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    within = program % (GROUP * blocks_n)
    return (first + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def gemm_kernel(
    codes, weight, bias, code_scale, weight_scale, output, rows, columns, depth, rows_per_scale,
    GROUP: tl.constexpr, ADDS: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Codes ``[rows, depth]`` times a weight ``[padded columns, depth]``."""
    first_row, first_column = block_of(rows, columns, GROUP, BLOCK_M, BLOCK_N)
    # Rows beyond the last read the last one again, and are not stored: no mask in the loop.
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - first_row)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = codes + first_row.to(tl.int64) * depth + (row * depth)[:, None] + k[None, :]
    b = weight + (column * depth)[None, :] + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, depth // BLOCK_K):
        sums = tl.dot(tl.load(a), tl.load(b), sums)
        a += BLOCK_K
        b += BLOCK_K
    finish(sums, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row, first_column,
           ADDS, SUMS, PARTS, BLOCK_M, BLOCK_N)


@triton.jit
def conv_kernel(
    codes, weight, bias, code_scale, weight_scale, output, rows, columns, height, width,
    padded_height, padded_width, channels, kernel_height, run, rows_per_scale,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, ADDS: tl.constexpr, SUMS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A convolution of codes with zeros around, whose rows of output are the pixels of all images.

    ``run`` is the kernel's width times the channels: the codes under one row of the kernel are neighbours in memory.
    """
    first_row, first_column = block_of(rows, columns, GROUP, BLOCK_M, BLOCK_N)
    row = tl.minimum(first_row + tl.arange(0, BLOCK_M), rows - 1)
    x = row % width
    image = row // width // height
    y = row // width % height
    first_image = first_row // (width * height)
    start = (first_image * padded_height).to(tl.int64) * (padded_width * channels)
    place = ((image - first_image) * padded_height + y * STRIDE) * padded_width + x * STRIDE
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = codes + start + (place * channels)[:, None] + k[None, :]
    b = weight + (column * (kernel_height * run))[None, :] + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    jump = padded_width * channels - run  # from the end of one row of the kernel to the next row of the image
    left = run
    for _ in range(0, kernel_height * run // BLOCK_K):
        sums = tl.dot(tl.load(a), tl.load(b), sums)
        left -= BLOCK_K
        step = tl.where(left == 0, jump, 0)
        left = tl.where(left == 0, run, left)
        a += BLOCK_K + step
        b += BLOCK_K
    finish(sums, bias, code_scale, weight_scale, output, rows, columns, rows_per_scale, first_row, first_column,
           ADDS, SUMS, PARTS, BLOCK_M, BLOCK_N)
