"""The element-wise side: differences to â, ranges, scales and codes, in as few passes over memory as each scale allows.

Every kernel sees its input as ``[samples, rows, channels]``: tokens of a Linear, or pixels of an image, of which either
the channels or the pixels lie next to each other. Numbers equal those of :mod:`modiff.kernels.elementwise` bit for bit:
quotients are rounded to nearest, and products and sums are never fused, which the launchers see to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modiff.kernels.triton.norms import normalized

INT16_TOP = tl.constexpr(32767.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no place for a fraction, half to even
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FAR = tl.constexpr(512.0)  # beyond every code, with any zero point
WIDE = tl.constexpr(4194303.0)  # 2^22 - 1, beyond every number of steps
HUGE = tl.constexpr(3.0e38)

# Functions return at their end only: what follows another return is compiled too.
# fmt: off


@triton.jit
def nearest(x):
    """The nearest whole number, half to even, for ``|x| < 2^22``."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def whole_quotient(value, divisor, inverse):
    """How often a whole divisor goes into a whole value from 0 to 2^22, exactly, though the inverse is rounded."""
    found = tl.floor(value * inverse)
    rest = value - found * divisor
    found = tl.where(rest < 0.0, found - 1.0, found)
    return tl.where(rest >= divisor, found + 1.0, found)


@triton.jit
def held_number(held, codes, before, which, step, place, target, inside, AGAIN: tl.constexpr):
    """The number that stands for â; ``AGAIN``: before the codes in memory, of scale ``before[which]``, moved it."""
    number = tl.load(held + place, inside, 0).to(tl.float32)
    if AGAIN:
        code = tl.load(codes + target, inside, 0).to(tl.float32)
        width = tl.load(before + which)
        if step is not None:
            width = nearest(tl.div_rn(width, tl.load(step)))
        number = number - code * width
    return number


@triton.jit
def residual_of(value, number, step, center):
    """``a - â`` of the number that stands for â."""
    if step is None:
        residual = value - number
    else:
        unit = tl.load(step)
        middle = tl.load(center)
        low = (middle - INT16_TOP) * unit
        high = (middle + INT16_TOP) * unit
        residual = tl.maximum(tl.minimum(value, high), low) - (number + middle) * unit
    return residual


@triton.jit
def whole_steps(scale, step, top):
    """The nearest whole multiple of an int16 grid's step; the largest spans the grid."""
    if step is not None:
        unit = tl.load(step)
        most = tl.ceil(tl.div_rn(65534.0, top))
        ratio = tl.minimum(tl.div_rn(scale, unit), WIDE)
        scale = tl.minimum(tl.maximum(nearest(ratio), 1.0), most) * unit
    return scale


@triton.jit
def scale_of(low, high, step, top, clip, factor, SYMMETRIC: tl.constexpr):
    """Scale and zero point from a range, as :meth:`modiff.quantizers.affine.Limits.scale` finds them."""
    if SYMMETRIC:
        scale = tl.maximum(-low, high) * factor
        scale = whole_steps(tl.where(scale < TINY, 1.0, scale), step, top)
        zero = scale * 0.0
    else:
        low = tl.minimum(low, 0.0) * clip
        high = tl.maximum(high, 0.0) * clip
        scale = tl.div_rn(high - low, top)
        scale = whole_steps(tl.where(scale < TINY, 1.0, scale), step, top)
        zero = nearest(tl.minimum(tl.div_rn(-low, scale), FAR))
        zero = tl.minimum(tl.maximum(zero, 0.0), top)
    return scale, zero


@triton.jit
def token_scale(residual, inside, step, highest, clip, factor, SYMMETRIC: tl.constexpr):
    """Scale of each row from its own range; and scale and zero point in the shape of the block."""
    low = tl.min(tl.where(inside, residual, HUGE), 1)
    high = tl.max(tl.where(inside, residual, -HUGE), 1)
    found, point = scale_of(low, high, step, highest, clip, factor, SYMMETRIC)
    return found, found[:, None] + residual * 0.0, point[:, None] + residual * 0.0


@triton.jit
def known_scale(scale, zero, sample, channel, channels, like, PER: tl.constexpr):
    """Scale and zero point of a block, from memory, in the shape of ``like``."""
    middle = like * 0.0
    if PER == 3:
        where = sample * channels + channel
        width = tl.load(scale + where, channel < channels, 1.0)[None, :] + middle
        if zero is not None:
            middle += tl.load(zero + where, channel < channels, 0.0)[None, :]
    else:
        width = tl.load(scale + sample * (PER == 1)) + middle
        if zero is not None:
            middle += tl.load(zero + sample * (PER == 1))
    return width, middle


@triton.jit
def code_of(residual, width, middle, highest, SYMMETRIC: tl.constexpr, CLIPS: tl.constexpr):
    """Equation (4): the codes, less their zero point."""
    code = nearest(tl.minimum(tl.maximum(tl.div_rn(residual, width), -FAR), FAR))
    if SYMMETRIC:
        if CLIPS:
            code = tl.maximum(tl.minimum(code, highest), -highest)
    else:
        code = tl.minimum(tl.maximum(code + middle, 0.0), highest) - middle
    return code


@triton.jit
def advanced_of(code, value, number, width, step, center, COMPENSATES: tl.constexpr):
    """Equation (13): the codes that the state can take, and the next â as it is held."""
    if step is None:
        if COMPENSATES:  # noqa: SIM108 (a branch that Triton takes when it compiles)
            advanced = number + code * width
        else:
            advanced = value
    else:
        unit = tl.load(step)
        multiple = nearest(tl.div_rn(width, unit + width * 0.0))
        inverse = 1.0 / multiple
        most = whole_quotient(-(number - INT16_TOP), multiple, inverse)
        fewest = -whole_quotient(number + INT16_TOP, multiple, inverse)
        code = tl.maximum(tl.minimum(code, most), fewest)
        if COMPENSATES:
            advanced = number + code * multiple
        else:
            nearby = tl.minimum(tl.maximum(tl.div_rn(value, unit + value * 0.0), -WIDE), WIDE)
            plain = nearest(nearby) - tl.load(center)
            advanced = tl.minimum(tl.maximum(plain, -INT16_TOP), INT16_TOP)
    return code, advanced


@triton.jit
def quantize_kernel(
    a, held, codes, lows, highs, probes, scale, zero, units, known, again, before, step, center, mean,
    rstd, mul, add, offset, height, width, top_pad, left_pad, padded_height, padded_width, channels, padded_channels,
    a_row, a_channel, held_row, held_channel, affine_sample, group_size, epsilon, highest, clip, factor,
    PER: tl.constexpr, SYMMETRIC: tl.constexpr, CLIPS: tl.constexpr, COMPENSATES: tl.constexpr, MEASURES: tl.constexpr,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, AGAIN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Equations (4), (5) and (13) in one pass; see :func:`modiff.kernels.triton.launch.quantize` for the arguments.

    Each program makes some rows and channels of the padded codes, borders and channels beyond among them. PER: 0: one
    scale for all, 1: per sample, 2: per token, found here, 3: per sample and channel. NORM: 1: GroupNorm, 2: LayerNorm.
    AGAIN: undo the codes in memory, and make others, of the samples that ``again`` marks; all else is left alone.
    """
    sample = tl.program_id(2)
    position = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    y = position // padded_width - top_pad
    x = position % padded_width - left_pad
    written = position < padded_height * padded_width
    if AGAIN:  # masks that are false everywhere cost no traffic
        written = written & (tl.load(again + sample * (PER == 1)) + position * 0.0 > 0.0)
    rows_inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & written
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = rows_inside[:, None] & (channel < channels)[None, :]
    row = y * width + x
    start = (sample * height).to(tl.int64) * width
    source = start * channels + (row * a_row)[:, None] + (channel * a_channel)[None, :]
    place = start * channels + (row * held_row)[:, None] + (channel * held_channel)[None, :]
    target = (sample * padded_height).to(tl.int64) * padded_width * padded_channels
    target = target + position[:, None] * padded_channels + channel[None, :]
    value = tl.load(a + source, inside, 0.0).to(tl.float32)
    value = normalized(value, inside, channel, sample, mean, rstd, mul, add, offset, affine_sample, channels,
                       group_size, epsilon, NORM, ACTIVATION)
    number = value
    residual = value
    if held is not None:
        number = held_number(held, codes, before, sample * (PER == 1), step, place, target, inside, AGAIN)
        residual = residual_of(value, number, step, center)
    residual = tl.where(inside, residual, 0.0)
    if MEASURES:  # here, where the fewest values are alive
        slot = (sample * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(lows + slot, tl.min(tl.min(tl.where(inside, residual, HUGE), 1), 0))
        tl.store(highs + slot, tl.max(tl.max(tl.where(inside, residual, -HUGE), 1), 0))
    if PER == 2:
        found, wide, middle = token_scale(residual, inside, step, highest, clip, factor, SYMMETRIC)
        tl.store(scale + start + row, found, rows_inside)
    else:
        wide, middle = known_scale(scale, zero, sample, channel, channels, residual, PER)
    code = code_of(residual, wide, middle, highest, SYMMETRIC, CLIPS)
    if known is not None:  # a scale from before there was one moves nothing
        code = code * tl.load(known + sample * (PER == 1))
    if held is not None:
        code, advanced = advanced_of(code, value, number, wide, step, center, COMPENSATES)
        tl.store(held + place, advanced.to(held.dtype.element_ty), inside)
    if units is not None:  # what one code is worth in the container
        code = code * tl.load(units + sample * channels + channel, channel < channels, 0.0)[None, :]
    code = tl.where(inside, code, 0.0).to(tl.int8)
    tl.store(codes + target, code, written[:, None] & (channel < padded_channels)[None, :])
    slot = (sample * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    if not AGAIN:
        tl.store(probes + slot, tl.sum(tl.sum(tl.where(inside, value * 0.0, 0.0), 1), 0))


@triton.jit
def range_kernel(
    a, held, lows, highs, step, center, mean, rstd, mul, add, offset, rows, channels, a_row, a_channel,
    held_row, held_channel, affine_sample, group_size, epsilon,
    PER_CHANNEL: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, REPEATS: tl.constexpr,
):
    """The range of ``a - â`` of parts of each sample, NaN where ``a`` is not finite; a program reads several blocks.

    ``lows`` and ``highs`` are float32 ``[samples, parts]``, or ``[samples, parts, channels]``; ``a`` is what a norm
    makes of it, as in :func:`quantize_kernel`.
    """
    block = tl.program_id(0)
    sample = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
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
        value = normalized(value, inside, channel, sample, mean, rstd, mul, add, offset, affine_sample, channels,
                           group_size, epsilon, NORM, ACTIVATION)
        residual = value
        if held is not None:
            number = tl.load(held + place, inside, 0).to(tl.float32)
            residual = residual_of(value, number, step, center)
        low = tl.minimum(low, tl.where(inside, residual, HUGE))
        high = tl.maximum(high, tl.where(inside, residual, -HUGE))
        bad += tl.where(inside, value * 0.0, 0.0)
    if PER_CHANNEL:
        slot = (sample * tl.num_programs(0) + block) * channels + channel
        spoiled = tl.sum(bad, 0)
        tl.store(lows + slot, tl.min(low, 0) + spoiled, channel < channels)
        tl.store(highs + slot, tl.max(high, 0) + spoiled, channel < channels)
    else:
        slot = (sample * tl.num_programs(0) + block) * tl.num_programs(1) + tl.program_id(1)
        spoiled = tl.sum(tl.sum(bad, 1), 0)
        tl.store(lows + slot, tl.min(tl.min(low, 1), 0) + spoiled)
        tl.store(highs + slot, tl.max(tl.max(high, 1), 0) + spoiled)
