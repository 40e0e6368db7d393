"""The element-wise side: differences to â, ranges, codes and norms, in as few passes over memory as each scale allows.

Every kernel sees its input as ``[samples, rows, channels]``: tokens of a Linear, or pixels of an image, of which either
the channels or the pixels lie next to each other. Numbers equal those of :mod:`modiff.kernels.stages` bit for bit: quotients are rounded to nearest,
and products and sums are never fused, so the launchers switch that off.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT16_TOP = tl.constexpr(32767.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no place for a fraction, half to even
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FAR = tl.constexpr(512.0)  # beyond every code, with any zero point
HUGE = tl.constexpr(3.0e38)


@triton.jit
def nearest(x):
    """The nearest whole number, half to even, for ``|x| < 2^22``."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def whole_quotient(value, divisor, inverse):
    """How often a whole ``divisor`` goes into a whole ``value >= 0``, exactly, below 2^22; ``inverse`` may be rounded."""
    found = tl.floor(value * inverse)
    rest = value - found * divisor
    found = tl.where(rest < 0.0, found - 1.0, found)
    return tl.where(rest >= divisor, found + 1.0, found)


@triton.jit
def residual_of(value, held, step, center, place, inside):
    """``a - â`` and the number that stands for â; ``a`` itself where nothing is held."""
    if held is None:
        return value, value
    number = tl.load(held + place, inside, 0).to(tl.float32)
    if step is None:
        return value - number, number
    unit = tl.load(step)
    middle = tl.load(center)
    low = (middle - INT16_TOP) * unit
    high = (middle + INT16_TOP) * unit
    return tl.maximum(tl.minimum(value, high), low) - (number + middle) * unit, number


@triton.jit
def whole_steps(scale, step, top):
    """The nearest whole multiple of an int16 grid's step; the largest spans the grid."""
    if step is None:
        return scale
    unit = tl.load(step)
    most = tl.ceil(tl.div_rn(65534.0, top))
    ratio = tl.minimum(tl.div_rn(scale, unit), 4194303.0)
    return tl.minimum(tl.maximum(nearest(ratio), 1.0), most) * unit


@triton.jit
def scale_of(low, high, step, top, clip, factor, SYMMETRIC: tl.constexpr):
    """Scale and zero point from a range, as :func:`modiff.quantizers.affine.scale_from_range` finds them."""
    if SYMMETRIC:
        scale = tl.maximum(-low, high) * factor
        scale = whole_steps(tl.where(scale < TINY, 1.0, scale), step, top)
        return scale, scale * 0.0
    low = tl.minimum(low, 0.0) * clip
    high = tl.maximum(high, 0.0) * clip
    scale = tl.div_rn(high - low, top)
    scale = whole_steps(tl.where(scale < TINY, 1.0, scale), step, top)
    zero = nearest(tl.minimum(tl.div_rn(-low, scale), FAR))
    return scale, tl.minimum(tl.maximum(zero, 0.0), top)


@triton.jit
def normalized(value, rows_inside, inside, channel, sample, mean, rstd, gamma, beta, gain, shift, channels, group_size,
               epsilon, NORM: tl.constexpr, SILU: tl.constexpr):
    """GroupNorm with given moments, or LayerNorm with those of the row, then what follows it."""
    known = channel < channels
    if NORM == 1:
        group = sample * (channels // group_size) + channel // group_size
        value = (value - tl.load(mean + group, known, 0.0)[None, :]) * tl.load(rstd + group, known, 0.0)[None, :]
    if NORM == 2:
        count = channels.to(tl.float32)
        middle = tl.sum(value, 1)[:, None] / count
        centered = tl.where(inside, value - middle, 0.0)
        variance = tl.sum(centered * centered, 1)[:, None] / count
        value = centered * tl.rsqrt(variance + epsilon)
    if gamma is not None:
        value = value * tl.load(gamma + channel, known, 0.0).to(tl.float32)[None, :]
    if beta is not None:
        value = value + tl.load(beta + channel, known, 0.0).to(tl.float32)[None, :]
    if gain is not None:  # of an adaptive norm, one vector for each sample
        value = value * (1.0 + tl.load(gain + sample * channels + channel, known, 0.0).to(tl.float32)[None, :])
        value = value + tl.load(shift + sample * channels + channel, known, 0.0).to(tl.float32)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def quantize_kernel(
    a,  # any float [samples, height * width, channels]
    held,  # â: int16 numbers of a grid, or float; None quantizes a itself
    codes,  # int8 [samples, padded height, padded width, padded channels]; every element is written
    lows,  # float32 [samples, blocks of rows, blocks of channels]: ranges of the residual, for the next evaluation
    highs,
    probes,  # float32 [samples, blocks of rows, blocks of channels]: 0, or NaN where a is not finite
    scale,  # float32: one, [samples], [samples, channels]; per token it is written
    zero,  # zero points alike, or None
    units,  # float32 [samples, channels]: what one code is worth in the container, or None
    step,  # of the int16 grid, or None
    center,
    mean,
    rstd,
    gamma,
    beta,
    gain,
    shift,
    height,
    width,
    top_pad,
    left_pad,
    padded_height,
    padded_width,
    channels,
    padded_channels,
    a_row,  # strides: 1 and something else, one way or the other
    a_channel,
    held_row,
    held_channel,
    group_size,
    epsilon,
    highest,  # code, as a float
    clip,
    factor,
    PER: tl.constexpr,  # 0: one scale for all, 1: sample, 2: token, found here, 3: sample and channel
    SYMMETRIC: tl.constexpr,
    CLIPS: tl.constexpr,
    COMPENSATES: tl.constexpr,
    MEASURES: tl.constexpr,
    NORM: tl.constexpr,  # 0: none, 1: GroupNorm, 2: LayerNorm
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0)
    block_c = tl.program_id(1)
    sample = tl.program_id(2)
    position = block * BLOCK_R + tl.arange(0, BLOCK_R)
    y = position // padded_width - top_pad
    x = position % padded_width - left_pad
    written = position < padded_height * padded_width
    rows_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & written
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = rows_inside[:, None] & (channel < channels)[None, :]
    row = y * width + x
    start = (sample * height).to(tl.int64) * width
    source = start * channels + (row * a_row)[:, None] + (channel * a_channel)[None, :]
    place = start * channels + (row * held_row)[:, None] + (channel * held_channel)[None, :]
    value = tl.load(a + source, inside, 0.0).to(tl.float32)
    if (NORM > 0) or SILU:
        value = normalized(value, rows_inside, inside, channel, sample, mean, rstd, gamma, beta, gain, shift, channels,
                           group_size, epsilon, NORM, SILU)
        value = tl.where(inside, value, 0.0)
    residual, number = residual_of(value, held, step, center, place, inside)
    residual = tl.where(inside, residual, 0.0)

    offset = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if PER == 2:
        low = tl.min(tl.where(inside, residual, HUGE), 1)
        high = tl.max(tl.where(inside, residual, -HUGE), 1)
        found, middle = scale_of(low, high, step, highest, clip, factor, SYMMETRIC)
        tl.store(scale + start + row, found, rows_inside)
        width_of = found[:, None]
        offset += middle[:, None]
    else:
        if PER == 3:
            where = sample * channels + channel
            known = channel < channels
            width_of = tl.load(scale + where, known, 1.0)[None, :]
            if zero is not None:
                offset += tl.load(zero + where, known, 0.0)[None, :]
        else:
            width_of = tl.load(scale + sample * (PER == 1))
            if zero is not None:
                offset += tl.load(zero + sample * (PER == 1))
    code = nearest(tl.minimum(tl.maximum(tl.div_rn(residual, width_of + tl.zeros_like(residual)), -FAR), FAR))
    if SYMMETRIC:
        if CLIPS:
            code = tl.maximum(tl.minimum(code, highest), -highest)
    else:
        code = tl.minimum(tl.maximum(code + offset, 0.0), highest) - offset

    if held is not None:
        if step is not None:
            multiple = nearest(tl.div_rn(width_of, tl.load(step)))
            inverse = 1.0 / multiple
            most = whole_quotient(-(number - INT16_TOP), multiple, inverse)
            fewest = -whole_quotient(number + INT16_TOP, multiple, inverse)
            code = tl.maximum(tl.minimum(code, most), fewest)
            if COMPENSATES:
                advanced = number + code * multiple
            else:
                unit = tl.load(step)
                nearby = tl.minimum(tl.maximum(tl.div_rn(value, unit + tl.zeros_like(value)), -4194303.0), 4194303.0)
                advanced = nearest(nearby) - tl.load(center)
                advanced = tl.minimum(tl.maximum(advanced, -INT16_TOP), INT16_TOP)
        else:
            advanced = value
            if COMPENSATES:
                advanced = number + code * width_of
        tl.store(held + place, advanced.to(held.dtype.element_ty), inside)
    if units is not None:
        code = code * tl.load(units + sample * channels + channel, channel < channels, 0.0)[None, :]
    target = (sample * padded_height).to(tl.int64) * padded_width * padded_channels
    target = target + position[:, None] * padded_channels + channel[None, :]
    tl.store(codes + target, tl.where(inside, code, 0.0).to(tl.int8), written[:, None] & (channel < padded_channels)[None, :])

    slot = (sample * tl.num_programs(0) + block) * tl.num_programs(1) + block_c
    tl.store(probes + slot, tl.sum(tl.sum(value * 0.0, 1), 0))
    if MEASURES:
        tl.store(lows + slot, tl.min(tl.min(tl.where(inside, residual, HUGE), 1), 0))
        tl.store(highs + slot, tl.max(tl.max(tl.where(inside, residual, -HUGE), 1), 0))


@triton.jit
def range_kernel(
    a,
    held,
    lows,  # float32 [samples, blocks of rows, blocks of channels], or [samples, blocks of rows, channels]
    highs,
    step,
    center,
    rows,
    channels,
    a_row,
    a_channel,
    held_row,
    held_channel,
    PER_CHANNEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    REPEATS: tl.constexpr,  # blocks of rows that one program reads
):
    block = tl.program_id(0)
    block_c = tl.program_id(1)
    sample = tl.program_id(2)
    channel = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    start = (sample * rows).to(tl.int64) * channels
    low = tl.full((BLOCK_R, BLOCK_C), HUGE, tl.float32)
    high = tl.full((BLOCK_R, BLOCK_C), -HUGE, tl.float32)
    bad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in range(REPEATS):
        row = (block * REPEATS + i) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        source = start + (row * a_row)[:, None] + (channel * a_channel)[None, :]
        place = start + (row * held_row)[:, None] + (channel * held_channel)[None, :]
        value = tl.load(a + source, inside, 0.0).to(tl.float32)
        residual, _ = residual_of(value, held, step, center, place, inside)
        low = tl.minimum(low, tl.where(inside, residual, HUGE))
        high = tl.maximum(high, tl.where(inside, residual, -HUGE))
        bad += tl.where(inside, value * 0.0, 0.0)
    if PER_CHANNEL:
        slot = (sample * tl.num_programs(0) + block) * channels + channel
        spoiled = tl.sum(bad, 0)
        tl.store(lows + slot, tl.min(low, 0) + spoiled, channel < channels)
        tl.store(highs + slot, tl.max(high, 0) + spoiled, channel < channels)
    else:
        slot = (sample * tl.num_programs(0) + block) * tl.num_programs(1) + block_c
        spoiled = tl.sum(tl.sum(bad, 1), 0)
        tl.store(lows + slot, tl.min(tl.min(low, 1), 0) + spoiled)
        tl.store(highs + slot, tl.max(tl.max(high, 1), 0) + spoiled)


@triton.jit
def scale_kernel(
    lows,  # float32 [sets, parts]
    highs,
    scale,  # float32 [sets]
    zero,  # likewise, or None
    probes,  # likewise: 0, or NaN
    step,
    parts,
    highest,
    clip,
    factor,
    margin,  # by which ranges of the previous evaluation are widened
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), HUGE, tl.float32)
    high = tl.full((BLOCK,), -HUGE, tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        inside = first + index < parts
        one = tl.load(lows + which * parts + first + index, inside, HUGE)
        other = tl.load(highs + which * parts + first + index, inside, -HUGE)
        bad += one * 0.0 + other * 0.0
        low = tl.minimum(low, one)
        high = tl.maximum(high, other)
    least = tl.min(low, 0) * margin
    most = tl.max(high, 0) * margin
    found, middle = scale_of(least, most, step, highest, clip, factor, SYMMETRIC)
    tl.store(scale + which, found)
    if zero is not None:
        tl.store(zero + which, middle)
    tl.store(probes + which, tl.sum(bad, 0))


@triton.jit
def moments_kernel(
    a,  # any float [samples, rows, channels]
    means,  # float32 [samples, blocks of rows, channels]
    squares,  # likewise: sums of squared distances to that mean
    rows,
    channels,
    a_row,
    a_channel,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0)
    sample = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    start = (sample * rows).to(tl.int64) * channels
    source = start + (row * a_row)[:, None] + (channel * a_channel)[None, :]
    value = tl.load(a + source, inside, 0.0).to(tl.float32)
    count = tl.minimum(rows - block * BLOCK_R, BLOCK_R).to(tl.float32)
    mean = tl.sum(value, 0) / count
    distance = tl.where(inside, value - mean[None, :], 0.0)
    slot = (sample * tl.num_programs(0) + block) * channels + channel
    tl.store(means + slot, mean, channel < channels)
    tl.store(squares + slot, tl.sum(distance * distance, 0), channel < channels)


@triton.jit
def group_kernel(
    means,
    squares,
    mean,  # float32 [samples, groups]
    rstd,
    rows,
    channels,
    group_size,
    blocks,
    epsilon,
    BLOCK_R: tl.constexpr,  # rows of a block of moments_kernel
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least group_size
):
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
