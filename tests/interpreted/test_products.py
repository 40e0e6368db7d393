"""The products in the interpreter: sums equal those of ``kernels.accumulate``, with every scale and dtype of ô."""

from __future__ import annotations

import pytest
import torch
from selection import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from modiff.kernels import accumulate
from modiff.kernels.backend import OperatorShape
from modiff.kernels.triton import launch
from modiff.kernels.triton.tables import Blocks
from modiff.operators.adapters import find_adapter

SMALL = Blocks(rows=32, columns=32, depth=32, warps=4, stages=1, group=2)
LARGE = Blocks(rows=64, columns=128, depth=64, warps=4, stages=3, parts=4, group=8)
POISON = -77777


def codes_like(kind: str, *shape: int) -> Tensor:
    """Codes -127..127: random, or all at their extremes."""
    if kind == "random":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    return torch.full(shape, 127 if kind == "highest" else -127, dtype=torch.int8)


def shape_of(module: nn.Module) -> OperatorShape:
    """An operator as plain data."""
    return find_adapter(module).shape(module, None)


def pad_columns(weight: Tensor) -> Tensor:
    """The weight with zeros up to a multiple of 128 columns."""
    return F.pad(weight, [0] * (2 * weight.ndim - 1) + [-weight.shape[0] % 128])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SIZES = [(1, 16, 64), (77, 48, 128), (70, 144, 64)]


@pytest.mark.parametrize(
    ("blocks", "kind", "size"),
    crossed(
        [(SMALL, LARGE), ("random", "highest", "lowest"), SIZES],
        lambda blocks, kind, size: (kind == "random") == (blocks is SMALL),
    ),
)
def test_gemm_sums(blocks: Blocks, kind: str, size: tuple[int, int, int]) -> None:
    rows, columns, depth = size
    codes, weight = (
        codes_like(kind, rows, depth),
        codes_like("random" if kind == "random" else "highest", columns, depth),
    )
    output = torch.full((rows, columns), POISON, dtype=torch.int32)
    launch.product(output, codes, pad_columns(weight), torch.ones(columns), None, None, 1, False, True, blocks)
    assert torch.equal(output.double(), accumulate(codes, weight, shape_of(nn.Linear(depth, columns))))


def test_sums_at_the_depth_of_a_large_convolution_are_exact() -> None:
    """K = 11520: float32 could not hold them."""
    codes, weight = codes_like("highest", 3, 11520), codes_like("highest", 16, 11520)
    codes[:, 1::2] -= 1
    output = torch.full((3, 16), POISON, dtype=torch.int32)
    launch.product(output, codes, pad_columns(weight), torch.ones(16), None, None, 1, False, True, LARGE)
    assert torch.equal(output.double(), accumulate(codes, weight, shape_of(nn.Linear(11520, 16))))


@pytest.mark.parametrize(
    ("blocks", "stride"), crossed([(SMALL, LARGE), (1, 2)], lambda blocks, stride: (blocks is SMALL) == (stride == 1))
)
@pytest.mark.parametrize(
    ("batch", "channels", "columns", "size", "kernel"),
    [
        (1, 64, 16, (5, 7), (3, 3)),
        (3, 64, 144, (4, 2), (3, 3)),
        (2, 64, 32, (9, 1), (5, 1)),
        (2, 128, 16, (4, 4), (1, 1)),
    ],
)
def test_convolution_sums(
    blocks: Blocks, stride: int, batch: int, channels: int, columns: int, size: tuple[int, int], kernel: tuple[int, int]
) -> None:
    shape = shape_of(nn.Conv2d(channels, columns, kernel, stride, (kernel[0] // 2, kernel[1] // 2)))
    codes = codes_like("random", batch, channels, *size)
    weight = codes_like("random", columns, channels, *kernel)
    expected = accumulate(codes, weight, shape)
    padded = F.pad(codes.permute(0, 2, 3, 1), (0, 0, kernel[1] // 2, kernel[1] // 2, kernel[0] // 2, kernel[0] // 2))
    laid_out = pad_columns(weight.permute(0, 2, 3, 1)).contiguous()
    output = torch.full((batch, *expected.shape[2:], columns), POISON, dtype=torch.int32)
    launch.product(output, padded.contiguous(), laid_out, torch.ones(columns), None, None, stride, False, True, blocks)
    assert torch.equal(output.permute(0, 3, 1, 2).double(), expected)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SETS = (1, 6, 30)  # one scale for all, for each of six samples, for each row


@pytest.mark.parametrize(
    ("dtype", "sets", "blocks"),
    crossed(
        [DTYPES, SETS, (SMALL, LARGE)],
        lambda dtype, sets, blocks: DTYPES.index(dtype) == SETS.index(sets) and (blocks is SMALL) == (sets != 6),
    ),
)
def test_the_output_advances_by_scaled_sums(dtype: torch.dtype, sets: int, blocks: Blocks) -> None:
    codes, weight = codes_like("random", 30, 64), codes_like("random", 48, 64)
    weight_scale, code_scale, before = torch.rand(48) / 100, torch.rand(sets) / 100, torch.randn(30, 48).to(dtype)
    output = before.clone()
    launch.product(output, codes, pad_columns(weight), weight_scale, code_scale, None, 1, True, False, blocks)
    scale = code_scale.double().repeat_interleave(30 // sets)[:, None] * weight_scale.double()
    expected = before.double() + scale * (codes.double() @ weight.double().T)
    assert output.dtype == dtype
    # Three roundings in float32 and one in the dtype of the output.
    torch.testing.assert_close(output.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_product_without_state_adds_the_bias_and_writes_every_element() -> None:
    codes, weight, bias = codes_like("random", 30, 64), codes_like("random", 48, 64), torch.randn(48)
    output = torch.full((30, 48), float("nan"))
    launch.product(output, codes, pad_columns(weight), torch.ones(48), None, bias, 1, False, False, SMALL)
    torch.testing.assert_close(output.double(), codes.double() @ weight.double().T + bias.double(), rtol=1e-6, atol=0)


def test_memory_beside_the_output_is_not_written() -> None:
    codes, weight = codes_like("random", 5, 64), codes_like("random", 16, 64)
    room = torch.full((9, 16), POISON, dtype=torch.int32)
    launch.product(room[2:7], codes, pad_columns(weight), torch.ones(16), None, None, 1, False, True, LARGE)
    assert (room[:2] == POISON).all()
    assert (room[7:] == POISON).all()
