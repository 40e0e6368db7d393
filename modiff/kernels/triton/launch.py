"""Launches of the kernels: grids, strides and blocks. :mod:`modiff.kernels.triton.library` calls nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from modiff.kernels.triton import encoding, norms, products, scaling
from modiff.kernels.triton.layout import SAMPLE, SAMPLE_CHANNEL, TENSOR, TOKEN
from modiff.kernels.triton.tables import Blocks, Product, Table, architecture_of, table

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on tensors of the CPU: ``TRITON_INTERPRET=1`` when it was imported."""
INTERPRETER_BLOCKS = Blocks(rows=64, columns=64, depth=32, warps=4, stages=1)
__all__ = ["SAMPLE", "SAMPLE_CHANNEL", "TENSOR", "TOKEN"]
NORMS = {"none": 0, "group": 1, "layer": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2, "gelu": 3}
FACTS: dict[str, Any] = {"enable_fp_fusion": False}
"""Of every launch: numbers equal those of PyTorch's eager operations."""


def table_for(device: torch.device) -> Table:
    """The tuned table of a device; small blocks in the interpreter."""
    if device.type == "cpu":
        return Table("interpreter", ((0, 0, INTERPRETER_BLOCKS),), {}, elements=2048)
    architecture = architecture_of(torch.cuda.get_device_capability(device))
    assert architecture is not None  # the backend says so before
    return table(architecture)


def product(
    output: Tensor,
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    code_scale: Tensor | None,
    bias: Tensor | None,
    stride: int,
    adds: bool,
    sums: bool = False,
    blocks: Blocks | None = None,
) -> None:
    """``output (+)= code scale · weight scale · sum``, plus the bias.

    Args:
        output: Any float (int32 for ``sums``), ``[rows, columns]`` or ``[batch, height, width, columns]``, contiguous.
        codes: int8 ``[rows, depth]``, or ``[batch, padded height, padded width, channels]``, contiguous.
        weight: int8 ``[padded columns, depth]``, or ``[padded columns, kernel height, kernel width, channels]``.
        weight_scale: float32 ``[columns]``.
        code_scale: float32, one number for each part of the rows: for all, for an image, or for each row.
        bias: float32 ``[columns]``.
        stride: Of a convolution.
        adds: To what the output holds, which is then read.
        sums: Write the integer sums, without any scale.
        blocks: Instead of those of the table.
    """
    columns = output.shape[-1]
    rows = output.numel() // columns
    is_conv = codes.ndim == 4
    depth = weight[0].numel()
    run = weight.shape[2] * weight.shape[3] if is_conv else depth
    blocks = blocks or table_for(codes.device).blocks(Product(rows, columns, depth, run))
    per_scale = max(rows // code_scale.numel(), 1) if code_scale is not None else 1
    grid = (triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns),)
    options: dict[str, Any] = {
        "GROUP": blocks.group,
        "ADDS": adds,
        "SUMS": sums,
        "PARTS": blocks.parts,
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.columns,
        "BLOCK_K": blocks.depth,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        **FACTS,
    }
    operands = (codes, weight, bias, code_scale, weight_scale, output, rows, columns)
    if not is_conv:
        products.gemm_kernel[grid](*operands, depth, per_scale, **options)
        return
    sizes = (*output.shape[1:3], *codes.shape[1:], weight.shape[1], run)
    products.conv_kernel[grid](*operands, *sizes, per_scale, STRIDE=stride, **options)


@dataclass(frozen=True)
class Codes:
    """The numbers of a quantizer, as the kernels take them.

    Args:
        highest: Code.
        clip: Share of the range that is kept.
        symmetric: Codes -highest..highest; else 0..highest.
        clips: Codes can fall outside.
    """

    highest: int
    clip: float
    symmetric: bool
    clips: bool

    @property
    def arguments(self) -> tuple[float, float, float]:
        """Highest code, clip, and their ratio, rounded to float32 when they are passed."""
        return float(self.highest), self.clip, self.clip / self.highest


@dataclass(frozen=True)
class Norm:
    """What stands before the quantizer.

    Args:
        kind: ``none``, ``group`` or ``layer``.
        activation: What follows the norm: ``silu``, ``gelu_tanh``, ``gelu`` or None.
        mean: Of groups, float32 ``[samples, groups]``.
        rstd: Likewise.
        mul: Factor after the norm, float32 ``[channels]`` or ``[samples, channels]``.
        add: Summand after it, likewise.
        offset: Added before the norm, float32 ``[samples, channels]``.
        epsilon: Of a LayerNorm.
    """

    kind: str = "none"
    activation: str | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    mul: Tensor | None = None
    add: Tensor | None = None
    offset: Tensor | None = None
    epsilon: float = 1e-5

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """As the kernels take them."""
        return self.mean, self.rstd, self.mul, self.add, self.offset

    def numbers(self, channels: int) -> tuple[int, int, float]:
        """From one sample's factors to the next one's, the channels of a group, and epsilon."""
        wide = any(t is not None and t.ndim == 2 for t in (self.mul, self.add))
        return channels * wide, channels if self.mean is None else channels // self.mean.shape[1], self.epsilon

    @property
    def constants(self) -> dict[str, int]:
        """What is compiled in."""
        return {"NORM": NORMS[self.kind], "ACTIVATION": ACTIVATIONS[self.activation]}


PLAIN = Norm()
"""Nothing stands before the quantizer."""


def block_of(channels: int, elements: int, whole_rows: bool) -> tuple[int, int]:
    """Rows and channels of an element-wise program.

    Args:
        channels: Of the tensor.
        elements: Of the program.
        whole_rows: The program needs all channels of a row.

    >>> block_of(320, 4096, whole_rows=False), block_of(320, 4096, whole_rows=True)
    ((64, 64), (8, 512))
    """
    columns = triton.next_power_of_2(channels)
    if not whole_rows:
        columns = min(columns, 128)
        while columns > 32 and channels % columns:
            columns //= 2
    return max(elements // columns, 1), columns


def strides(a: Tensor) -> tuple[int, int]:
    """From one pixel to the next, and from one channel to the next, of a dense ``[samples, height, width, channels]``.

    >>> strides(torch.zeros(2, 3, 4, 5)), strides(torch.zeros(2, 5, 3, 4).permute(0, 2, 3, 1))
    ((5, 1), (1, 12))
    """
    channels_last = a.is_contiguous()
    if not (channels_last or a.permute(0, 3, 1, 2).is_contiguous()):
        raise ValueError(f"Strides {a.stride()} of a tensor {list(a.shape)} are neither of its usual layouts.")
    return (a.shape[3], 1) if channels_last else (1, a.shape[1] * a.shape[2])


# fmt: off
def quantize(
    codes: Tensor, a: Tensor, held: Tensor | None, grid: tuple[Tensor, Tensor] | None,
    scale: Tensor, zero: Tensor | None, units: Tensor | None, per: int, numbers: Codes, pads: tuple[int, int],
    compensates: bool = True, measures: bool = False, norm: Norm = PLAIN, known: Tensor | None = None,
    again: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write codes, advance â, and return probes and (where asked for) the ranges of the residual.

    Args:
        codes: int8 ``[samples, padded height, padded width, padded channels]``; overwritten.
        a: Any float ``[samples, height, width, channels]``; see :func:`strides`.
        held: â, likewise.
        grid: Step and center of an int16 â.
        scale: float32; one number, ``[samples]``, ``[samples, channels]``; per token it is written: one for each row.
        zero: Zero points, likewise.
        units: What one code is worth in the container, ``[samples, channels]``.
        per: :data:`TENSOR`, :data:`SAMPLE`, :data:`TOKEN` or :data:`SAMPLE_CHANNEL`.
        numbers: Of the quantizer.
        pads: Zeros above and left of the image.
        compensates: See :class:`modiff.quantizers.held.Held`.
        measures: Also find the range of the residual.
        norm: Before the quantizer.
        known: float32, 0 for the sets that have no scale yet: their codes are 0, and their â stays.
        again: Which sets are done anew (float32, not 0), and the scale of the codes that were made of them before:
            their â goes back first. Per tensor or sample, compensated, and without probes.

    Returns:
        Probes, lows and highs, float32 ``[samples, parts]``; lows and highs are empty where nothing is measured.
    """
    samples, height, width, channels = a.shape
    tuned = table_for(a.device)
    rows, columns = block_of(codes.shape[3], tuned.elements, per == TOKEN or norm.kind == "layer")
    blocks = triton.cdiv(codes.shape[1] * codes.shape[2], rows), triton.cdiv(codes.shape[3], columns), samples
    parts = blocks[0] * blocks[1]
    probes = torch.empty(samples, parts, dtype=torch.float32, device=a.device)
    lows = torch.empty(samples, parts if measures else 0, dtype=torch.float32, device=a.device)
    highs = torch.empty_like(lows)
    encoding.quantize_kernel[blocks](
        *(a, held, codes, lows, highs, probes, scale, zero, units, known, *(again or (None, None))),
        *(*(grid or (None, None)), *norm.tensors),
        *(height, width, *pads, codes.shape[1], codes.shape[2], channels, codes.shape[3]),
        *(*strides(a), *strides(a if held is None else held), *norm.numbers(channels), *numbers.arguments),
        PER=per, SYMMETRIC=numbers.symmetric, CLIPS=numbers.clips or held is not None, COMPENSATES=compensates,
        MEASURES=measures, AGAIN=again is not None, **norm.constants, BLOCK_R=rows, BLOCK_C=columns,
        num_warps=tuned.warps, **FACTS,
    )
    return probes, lows, highs
# fmt: on


def ranges(
    a: Tensor, held: Tensor | None, grid: tuple[Tensor, Tensor] | None, per_channel: bool, norm: Norm = PLAIN
) -> tuple[Tensor, Tensor]:
    """Smallest and largest ``a - â`` of parts of each sample; NaN where ``a`` is not finite.

    Args:
        a: Any float ``[samples, height, width, channels]``; see :func:`strides`.
        held: â, likewise.
        grid: Step and center of an int16 â.
        per_channel: Of each channel, ``[samples, parts, channels]``; else ``[samples, parts]``.
        norm: Before the quantizer.
    """
    samples, height, width, channels = a.shape
    tuned = table_for(a.device)
    rows, columns = block_of(channels, tuned.elements, whole_rows=norm.kind == "layer")
    repeats = 4
    grid_size = (triton.cdiv(height * width, rows * repeats), triton.cdiv(channels, columns), samples)
    shape = (samples, grid_size[0], channels) if per_channel else (samples, grid_size[0] * grid_size[1])
    lows = torch.empty(shape, dtype=torch.float32, device=a.device)
    highs = torch.empty_like(lows)
    encoding.range_kernel[grid_size](
        *(a, held, lows, highs, *(grid or (None, None)), *norm.tensors, height * width, channels),
        *(*strides(a), *strides(a if held is None else held), *norm.numbers(channels)),
        PER_CHANNEL=per_channel,
        **norm.constants,
        BLOCK_R=rows,
        BLOCK_C=columns,
        REPEATS=repeats,
        num_warps=tuned.warps,
        **FACTS,
    )
    return lows, highs


def scales(
    lows: Tensor, highs: Tensor, step: Tensor | None, numbers: Codes, margin: float = 1.0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale, zero point and probe of each set, from the ranges of its parts ``[sets, parts]``."""
    sets, parts = lows.shape
    scale = torch.empty(sets, dtype=torch.float32, device=lows.device)
    zero = None if numbers.symmetric else torch.empty_like(scale)
    probes = torch.empty_like(scale)
    scaling.scale_kernel[(sets,)](
        *(lows, highs, scale, zero, probes, step, parts, *numbers.arguments, margin),
        SYMMETRIC=numbers.symmetric,
        BLOCK=_block(parts),
        num_warps=4,
        **FACTS,
    )
    return scale, zero, probes


def settle(
    ranges: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor | None],
    last: Tensor,
    step: Tensor | None,
    numbers: Codes,
    margin: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The scale of the evaluation before where the range of this one fits it, else this one's own.

    Args:
        ranges: Of this evaluation, each ``[sets, parts]``.
        before: Scale and zero point from the range of the evaluation before, with the margin.
        last: That range, float32 ``[3, sets]``; replaced by this one's.
        step: Of the int16 grid.
        numbers: Of the quantizer.
        margin: As in ``before``.

    Returns:
        Scale, zero point, and which sets did not fit, float32.
    """
    sets, parts = ranges[0].shape
    scale, again = torch.empty_like(before[0]), torch.empty_like(before[0])
    zero = None if numbers.symmetric else torch.empty_like(scale)
    scaling.settle_kernel[(sets,)](
        *(*ranges, *before, last, scale, zero, again, step, sets, parts, *numbers.arguments, margin),
        SYMMETRIC=numbers.symmetric,
        BLOCK=_block(parts),
        num_warps=4,
        **FACTS,
    )
    return scale, zero, again


def shared_scales(
    lows: Tensor, highs: Tensor, step: Tensor | None, numbers: Codes, exponent: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Scales that are powers of two times one per sample, from the ranges of parts ``[samples, parts, channels]``.

    Args:
        lows: Smallest values.
        highs: Largest values.
        step: Of the int16 grid.
        numbers: Of the quantizer.
        exponent: The largest.

    Returns:
        Scale, zero point and power, float32 ``[samples, channels]``; the unit of the container and the probe of each
        sample.
    """
    samples, parts, channels = lows.shape
    scale = torch.empty(samples, channels, dtype=torch.float32, device=lows.device)
    zero = None if numbers.symmetric else torch.empty_like(scale)
    power, unit = torch.empty_like(scale), torch.empty(samples, dtype=torch.float32, device=lows.device)
    probes = torch.empty_like(unit)
    columns = triton.next_power_of_2(channels)
    scaling.shared_kernel[(samples,)](
        *(lows, highs, scale, zero, power, unit, probes, step, parts, channels, exponent, *numbers.arguments),
        float(2**exponent),
        SYMMETRIC=numbers.symmetric,
        BLOCK_P=max(min(2048 // columns, triton.next_power_of_2(parts)), 1),
        BLOCK_C=columns,
        num_warps=4 if columns <= 2048 else 16,
        **FACTS,
    )
    return scale, zero, power, unit, probes


def _block(parts: int) -> int:
    return min(max(int(triton.next_power_of_2(parts)), 32), 1024)


def moments(a: Tensor, groups: int, epsilon: float, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation of the groups of channels of ``[samples, height, width, channels]``.

    Args:
        a: Any float.
        groups: Of channels.
        epsilon: Of the norm.
        offset: Added to ``a``, float32 ``[samples, channels]``.
    """
    samples, height, width, channels = a.shape
    tuned = table_for(a.device)
    rows, columns = block_of(channels, 2 * tuned.elements, whole_rows=False)
    blocks = triton.cdiv(height * width, rows)
    means = torch.empty(samples, blocks, channels, dtype=torch.float32, device=a.device)
    squares = torch.empty_like(means)
    norms.moments_kernel[(blocks, triton.cdiv(channels, columns), samples)](
        *(a, offset, means, squares, height * width, channels, *strides(a)),
        BLOCK_R=rows,
        BLOCK_C=columns,
        num_warps=tuned.warps,
        **FACTS,
    )
    mean = torch.empty(samples, groups, dtype=torch.float32, device=a.device)
    rstd = torch.empty_like(mean)
    norms.group_kernel[(groups, samples)](
        *(means, squares, mean, rstd, height * width, channels, channels // groups, blocks, epsilon),
        BLOCK_R=rows,
        BLOCK_P=16,
        BLOCK_C=triton.next_power_of_2(channels // groups),
        num_warps=1,
        **FACTS,
    )
    return mean, rstd
