"""Packing must be exact at every width and shape, and as small as the width says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff.config.quant import QuantSpec
from modiff.errors import CheckpointError
from modiff.quantizers.packing import PackedWeight, pack_codes, packed_bytes, unpack_codes
from modiff.quantizers.rounding import round_nearest

BITS = st.integers(2, 8)
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def reference_bytes(codes: list[int], bits: int) -> list[int]:
    """The bit stream as one big number, least significant first."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@settings(max_examples=150, deadline=None)
@given(bits=BITS, shape=SHAPES, seed=st.integers(0, 1000))
def test_packed_codes_come_back_and_take_their_true_width(bits, shape, seed):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference_bytes(codes.flatten().tolist(), bits)
    assert packed.numel() == packed_bytes(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack_codes(packed, bits, codes.shape), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_extreme_codes_survive_and_memory_is_not_shared(bits):
    codes = torch.tensor([2**bits - 1, 0] * 9, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    codes.zero_()
    unpacked = unpack_codes(packed, bits, (18,))
    packed.zero_()
    assert unpacked.tolist() == [2**bits - 1, 0] * 9
    assert pack_codes(torch.full((8,), 2**bits - 1), bits).tolist() == [255] * bits


@settings(max_examples=100, deadline=None)
@given(
    bits=BITS,
    granularity=st.sampled_from(["tensor", "channel", "group"]),
    symmetric=st.booleans(),
    shape=st.sampled_from([(5, 7), (4, 6, 3), (3, 5, 3, 3), (2, 3, 1, 2, 2), (1, 1)]),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_a_packed_weight_is_the_weight_that_was_rounded(
    bits, granularity, symmetric, shape, channels_last, dtype, seed
):
    spec = QuantSpec(bits, granularity, symmetric, group_size=3 if granularity == "group" else None)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if channels_last and weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    rounded = round_nearest(weight, spec)
    packed = PackedWeight.pack(rounded, spec)
    unpacked = packed.unpack()
    assert torch.equal(unpacked.codes, rounded.codes)
    assert torch.equal(unpacked.scale, rounded.scale)
    assert (unpacked.zero_point is None) == symmetric
    assert symmetric or torch.equal(unpacked.zero_point, rounded.zero_point)
    assert torch.equal(unpacked.dequantize(), rounded.dequantize())
    assert packed.scale.numel() == unpacked.num_scales == rounded.num_scales
    assert packed.codes.numel() == packed_bytes(weight.numel(), bits)


def packed_example() -> PackedWeight:
    spec = QuantSpec(4, "channel")
    return PackedWeight.pack(round_nearest(torch.randn(4, 6), spec), spec)


def test_inconsistent_parts_are_refused():
    good = packed_example()
    with pytest.raises(CheckpointError, match=r"11 bytes of codes .* \[4, 6\] of 4 bits, which has 12"):
        PackedWeight(good.codes[1:], good.scale, None, good.shape, good.spec)
    with pytest.raises(CheckpointError, match=r"shape \[3, 1\].*'channel' needs \[4, 1\]"):
        PackedWeight(good.codes, good.scale[1:], None, good.shape, good.spec)
    with pytest.raises(CheckpointError, match="symmetric, but zero points were given"):
        PackedWeight(good.codes, good.scale, good.scale.to(torch.uint8), good.shape, good.spec)
    asymmetric = QuantSpec(4, "channel", symmetric=False)
    with pytest.raises(CheckpointError, match="asymmetric, but zero points were not given"):
        PackedWeight(good.codes, good.scale, None, good.shape, asymmetric)
