"""Scales and zero points from ranges: of this evaluation, of the one before, and in powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

from modiff.kernels.triton.encoding import FAR, HUGE, TINY, nearest, scale_of

# fmt: off


@triton.jit
def range_of_parts(lows, highs, which, parts, BLOCK: tl.constexpr):
    """Smallest and largest value of a set, and NaN (else 0), from its parts, float32 ``[sets, parts]``."""
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
    return tl.min(low, 0), tl.max(high, 0), tl.sum(bad, 0)


@triton.jit
def scale_kernel(
    lows, highs, scale, zero, probes, step, parts, highest, clip, factor, margin,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):
    """Scale, zero point and probe (0, or NaN) of each set, from the ranges of its parts.

    A margin widens ranges of the evaluation before.
    """
    which = tl.program_id(0)
    low, high, bad = range_of_parts(lows, highs, which, parts, BLOCK)
    found, middle = scale_of(low * margin, high * margin, step, highest, clip, factor, SYMMETRIC)
    tl.store(scale + which, found)
    if zero is not None:
        tl.store(zero + which, middle)
    tl.store(probes + which, bad)


@triton.jit
def settle_kernel(
    lows, highs, before, before_zero, last, scale, zero, again, step, sets, parts, highest, clip, factor, margin,
    SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keep the scale of the evaluation before where the range of this one fits it, else find this one's.

    ``last`` (float32 ``[3, sets]``: lowest, highest, 1 where there are such) then holds this range. ``again`` says for
    which sets the codes must be made anew.
    """
    which = tl.program_id(0)
    low, high, _ = range_of_parts(lows, highs, which, parts, BLOCK)
    least = tl.load(last + which) * margin
    most = tl.load(last + sets + which) * margin
    if SYMMETRIC:
        fits = tl.maximum(-low, high) <= tl.maximum(-least, most)
    else:
        fits = (tl.minimum(low, 0.0) >= tl.minimum(least, 0.0)) & (tl.maximum(high, 0.0) <= tl.maximum(most, 0.0))
    fits = fits & (tl.load(last + 2 * sets + which) > 0.0)
    found, middle = scale_of(low, high, step, highest, clip, factor, SYMMETRIC)
    tl.store(scale + which, tl.where(fits, tl.load(before + which), found))
    if zero is not None:
        tl.store(zero + which, tl.where(fits, tl.load(before_zero + which), middle))
    tl.store(again + which, tl.where(fits, 0.0, 1.0))
    tl.store(last + which, low)
    tl.store(last + sets + which, high)
    tl.store(last + 2 * sets + which, 1.0)


@triton.jit
def exponent_of(own, shared, most):
    """``clamp(floor(log2(shared / own)), 0, most)`` by the floats' own bits; ``most`` where ``own`` is 0.

    As :func:`modiff.quantizers.exponents.exponents`: a subnormal ``own`` is that far below every ``shared``.
    """
    bits = own.to(tl.int32, bitcast=True)
    others = (shared + own * 0.0).to(tl.int32, bitcast=True)
    found = ((others >> 23) & 255) - ((bits >> 23) & 255)
    found = found - tl.where((others & 0x7FFFFF) < (bits & 0x7FFFFF), 1, 0)
    found = tl.minimum(tl.maximum(found, 0), most)
    return tl.where(own > 0.0, found, most)


@triton.jit
def shared_kernel(
    lows, highs, scale, zero, power, unit, probes, step, parts, channels, most, highest, clip, factor, room,
    SYMMETRIC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Scales per sample and channel that are powers of two times one per sample, as ``Limits.shared_scale`` finds them.

    ``lows`` and ``highs`` are float32 ``[samples, parts, channels]``; ``room`` is two to the power ``most``, the
    largest exponent; BLOCK_C holds all channels.
    """
    sample = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    known = channel < channels
    low = tl.full((BLOCK_P, BLOCK_C), HUGE, tl.float32)
    high = tl.full((BLOCK_P, BLOCK_C), -HUGE, tl.float32)
    bad = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start = (sample * parts).to(tl.int64) * channels
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & known[None, :]
        slot = start + (part * channels)[:, None] + channel[None, :]
        one = tl.load(lows + slot, inside, HUGE)
        other = tl.load(highs + slot, inside, -HUGE)
        bad += one * 0.0 + other * 0.0
        low = tl.minimum(low, one)
        high = tl.maximum(high, other)
    least = tl.min(low, 0)
    largest = tl.max(high, 0)
    if SYMMETRIC:
        own = tl.maximum(-least, largest) * factor
    else:
        least = tl.minimum(least, 0.0) * clip
        own = tl.div_rn(tl.maximum(largest, 0.0) * clip - least, highest + least * 0.0)
    own = tl.where(known, own, 0.0)
    smallest = tl.div_rn(tl.max(own, 0), room)
    smallest = tl.where(smallest < TINY, 1.0, smallest)
    if step is not None:
        width = tl.load(step)
        span = tl.ceil(tl.div_rn(65534.0, highest * room))
        smallest = tl.minimum(tl.maximum(tl.ceil(tl.div_rn(smallest, width)), 1.0), span) * width
    powers = ((127 + most - exponent_of(own, smallest * room, most)) << 23).to(tl.float32, bitcast=True)
    wide = smallest * powers
    place = sample * channels + channel
    tl.store(scale + place, wide, known)
    tl.store(power + place, powers, known)
    if zero is not None:
        middle = nearest(tl.minimum(tl.div_rn(-least, wide), FAR))
        tl.store(zero + place, tl.minimum(tl.maximum(middle, 0.0), highest), known)
    tl.store(unit + sample, smallest)
    tl.store(probes + sample, tl.sum(tl.sum(bad, 1), 0))
