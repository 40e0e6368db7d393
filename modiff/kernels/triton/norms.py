"""What stands before a quantizer: norms, activations, and the moments that a GroupNorm needs beforehand."""

from __future__ import annotations

import triton
import triton.language as tl

# fmt: off


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """SiLU (1), GELU by its tanh form (2), GELU (3), or nothing (0)."""
    if ACTIVATION == 1:
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == 2:  # x (1 + tanh u) / 2 is x / (1 + exp(-2 u))
        twice = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-twice))
    elif ACTIVATION == 3:
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    return value


@triton.jit
def normalized(value, inside, channel, sample, mean, rstd, mul, add, offset, affine_sample, channels, group_size,
               epsilon, NORM: tl.constexpr, ACTIVATION: tl.constexpr):
    """GroupNorm (1) with given moments, or LayerNorm (2) with those of the row, and what follows it; 0 outside.

    ``offset`` is added before a GroupNorm, whose moments are those of the sum.
    """
    known = channel < channels
    if offset is not None:
        value = value + tl.load(offset + sample * channels + channel, known, 0.0)[None, :]
    if NORM == 1:
        group = sample * (channels // group_size) + channel // group_size
        value = (value - tl.load(mean + group, known, 0.0)[None, :]) * tl.load(rstd + group, known, 0.0)[None, :]
    if NORM == 2:
        count = channels.to(tl.float32)
        middle = tl.sum(value, 1)[:, None] / count
        centered = tl.where(inside, value - middle, 0.0)
        variance = tl.sum(centered * centered, 1)[:, None] / count
        value = centered * tl.rsqrt(variance + epsilon)
    if mul is not None:  # one number for each channel, or for each sample and channel
        value = value * tl.load(mul + sample * affine_sample + channel, known, 0.0)[None, :]
    if add is not None:
        value = value + tl.load(add + sample * affine_sample + channel, known, 0.0)[None, :]
    value = activated(value, ACTIVATION)
    if NORM > 0:
        value = tl.where(inside, value, 0.0)
    return value


@triton.jit
def moments_kernel(
    a, offset, means, squares, rows, channels, a_row, a_channel, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Of blocks of rows, for each channel: the mean and the sum of squared distances to it.

    ``a`` is any float ``[samples, rows, channels]``, ``offset`` float32 ``[samples, channels]``, and the others are
    float32 ``[samples, blocks, channels]``.
    """
    block = tl.program_id(0)
    sample = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    start = (sample * rows).to(tl.int64) * channels
    source = start + (row * a_row)[:, None] + (channel * a_channel)[None, :]
    value = tl.load(a + source, inside, 0.0).to(tl.float32)
    if offset is not None:
        value += tl.where(inside, tl.load(offset + sample * channels + channel, channel < channels, 0.0)[None, :], 0.0)
    count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
    mean = tl.sum(value, 0) / count
    distance = tl.where(inside, value - mean[None, :], 0.0)
    slot = (sample * tl.num_programs(0) + block) * channels + channel
    tl.store(means + slot, mean, channel < channels)
    tl.store(squares + slot, tl.sum(distance * distance, 0), channel < channels)


@triton.jit
def group_kernel(
    means, squares, mean, rstd, rows, channels, group_size, blocks, epsilon,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Mean and reciprocal deviation of groups of channels, float32 ``[samples, groups]``, from :func:`moments_kernel`.

    BLOCK_R is the number of rows of one of its blocks; BLOCK_C is at least the size of a group.
    """
    group = tl.program_id(0)
    sample = tl.program_id(1)
    member = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, blocks, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < blocks)[:, None] & (member < group_size)[None, :]
        slot = (sample * blocks + part)[:, None] * channels + group * group_size + member[None, :]
        count = tl.minimum(rows - part * BLOCK_R, BLOCK_R).to(tl.float32)[:, None]
        total += tl.load(means + slot, inside, 0.0) * count
    size = (rows * group_size).to(tl.float32)
    middle = tl.sum(tl.sum(total, 1), 0) / size
    spread = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, blocks, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < blocks)[:, None] & (member < group_size)[None, :]
        slot = (sample * blocks + part)[:, None] * channels + group * group_size + member[None, :]
        count = tl.minimum(rows - part * BLOCK_R, BLOCK_R).to(tl.float32)[:, None]
        distance = tl.load(means + slot, inside, 0.0) - middle
        spread += tl.where(inside, tl.load(squares + slot, inside, 0.0) + distance * distance * count, 0.0)
    tl.store(mean + sample * tl.num_programs(0) + group, middle)
    variance = tl.sum(tl.sum(spread, 1), 0) / size
    tl.store(rstd + sample * tl.num_programs(0) + group, tl.div_rn(1.0, tl.sqrt_rn(variance + epsilon)))
