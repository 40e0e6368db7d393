"""Codes at their true width: 2 to 8 bits each, packed into bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modiff.config.specs import QuantSpec
from modiff.errors import CheckpointError
from modiff.quantizers.granularity import weight_partition
from modiff.quantizers.rounding import QuantizedWeight


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that hold ``count`` codes of ``bits`` bits.

    >>> packed_bytes(5, 3)
    2
    """
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into bytes, least significant bit first.

    Args:
        codes: Whole numbers 0 .. 2^bits - 1, any shape and dtype.
        bits: Width, 2 to 8.

    Returns:
        uint8 ``[packed_bytes(codes.numel(), bits)]``; surplus bits of the last byte are 0.

    >>> pack_codes(torch.tensor([1, 2, 3, 0, 1]), bits=2)
    tensor([57,  1], dtype=torch.uint8)
    """
    flat = codes.flatten().to(torch.uint8)
    digits, size = _group(bits)
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % digits)).view(-1, digits)
    return _regroup(groups, bits, 8, size).flatten()[: packed_bytes(len(flat), bits)].clone()


def unpack_codes(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Codes that :func:`pack_codes` packed.

    Args:
        packed: uint8 ``[packed_bytes(count, bits)]``.
        bits: Width, 2 to 8.
        shape: Shape of the codes.

    Returns:
        uint8 codes 0 .. 2^bits - 1 in ``shape``.

    >>> unpack_codes(torch.tensor([57, 1], dtype=torch.uint8), bits=2, shape=(5,))
    tensor([1, 2, 3, 0, 1], dtype=torch.uint8)
    """
    digits, size = _group(bits)
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % size)).view(-1, size)
    return _regroup(groups, 8, bits, digits).flatten()[: torch.Size(shape).numel()].view(shape)


def _group(bits: int) -> tuple[int, int]:
    """Codes, and bytes, of the shortest run of codes that fills whole bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _regroup(digits: Tensor, bits_in: int, bits_out: int, count: int) -> Tensor:
    """Read each row as one number of ``bits_in``-bit digits; write it as ``count`` digits of ``bits_out`` bits."""
    size = max(digits.shape[1] * bits_in, count * bits_out)  # at most 56 bits: the sign bit stays free
    dtype = torch.int16 if size <= 8 else torch.int32 if size <= 24 else torch.int64
    word = torch.zeros(len(digits), dtype=dtype, device=digits.device)
    for i in range(digits.shape[1]):
        word |= digits[:, i].to(dtype) << (bits_in * i)
    written = torch.empty(len(digits), count, dtype=torch.uint8, device=digits.device)
    for i in range(count):
        written[:, i] = (word >> (bits_out * i)) & (2**bits_out - 1)
    return written


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight as it is stored.

    Symmetric codes -n..n are stored as 0..2n.

    Args:
        codes: uint8 ``[packed_bytes(shape.numel(), spec.bits)]``.
        scale: float32 (float64 for float64 weights), one for each set of the weight's partition, all dims kept:
            ``[1, 1, ..]`` (``tensor``), ``[out, 1, ..]`` (``channel``) or ``[out, groups, 1, ..]`` (``group``).
        zero_point: uint8 in the shape of ``scale``; None when symmetric.
        shape: Shape of the weight, ``[out, in / groups, *kernel]``.
        spec: The quantizer.
        shift: Added to the operator's bias to make up for the rounding's mean error, in the dtype of ``scale``,
            ``[out]``; None: nothing.

    Raises:
        CheckpointError: A tensor's size does not fit the others.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: torch.Size
    spec: QuantSpec
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        expected = packed_bytes(self.shape.numel(), self.spec.bits)
        if self.codes.numel() != expected:
            raise CheckpointError(
                f"{self.codes.numel()} bytes of codes were given for a weight {list(self.shape)} of {self.spec.bits} "
                f"bits, which has {expected}. The checkpoint is inconsistent: save it again."
            )
        scale = list(weight_partition(self.spec).range_shape(self.shape))
        zero_point = scale if self.zero_point is None else list(self.zero_point.shape)
        if list(self.scale.shape) != scale or zero_point != scale:
            raise CheckpointError(
                f"The scales of a weight {list(self.shape)} have shape {list(self.scale.shape)}, zero points "
                f"{zero_point}; {self.spec.granularity!r} needs {scale}. The checkpoint is inconsistent: save it again."
            )
        if self.spec.symmetric != (self.zero_point is None):
            kind, given = ("symmetric", "were") if self.spec.symmetric else ("asymmetric", "were not")
            raise CheckpointError(f"The quantizer is {kind}, but zero points {given} given. Save the checkpoint again.")
        if self.shift is not None and list(self.shift.shape) != [self.shape[0]]:
            raise CheckpointError(
                f"The shift of a weight {list(self.shape)} has shape {list(self.shift.shape)}; it needs "
                f"[{self.shape[0]}]. The checkpoint is inconsistent: save it again."
            )

    @classmethod
    def pack(cls, weight: QuantizedWeight, spec: QuantSpec) -> PackedWeight:
        """Pack what a rounding method made for ``spec``."""
        partition = weight_partition(spec)
        codes = weight.codes - spec.code_range[0]
        zero_point = None if weight.zero_point is None else partition.compact(weight.zero_point).to(torch.uint8)
        scale = partition.compact(weight.scale)
        return cls(pack_codes(codes, spec.bits), scale, zero_point, weight.codes.shape, spec)

    def unpack(self) -> QuantizedWeight:
        """Codes as floats, scales and zero points that broadcast against them: exactly what was packed."""
        partition = weight_partition(self.spec)
        dtype = self.scale.dtype
        codes = unpack_codes(self.codes, self.spec.bits, self.shape).to(dtype) + self.spec.code_range[0]
        scale = partition.expand(self.scale, self.shape)
        zero_point = None if self.zero_point is None else partition.expand(self.zero_point.to(dtype), self.shape)
        return QuantizedWeight(codes, scale, zero_point, self.scale.numel())

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        shift = None if self.shift is None else self.shift.to(device)
        return PackedWeight(self.codes.to(device), self.scale.to(device), zero_point, self.shape, self.spec, shift)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What is to be stored, on the CPU, under ``<name>.codes`` and so on."""
        found = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "shift": self.shift}
        return {f"{name}.{key}": tensor.cpu() for key, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], name: str, shape: torch.Size | Sequence[int], spec: QuantSpec
    ) -> PackedWeight:
        """The weight of which :meth:`tensors` made these."""
        codes, scale = tensors[f"{name}.codes"], tensors[f"{name}.scale"]
        zero_point, shift = tensors.get(f"{name}.zero_point"), tensors.get(f"{name}.shift")
        return cls(codes, scale, zero_point, torch.Size(shape), spec, shift)
