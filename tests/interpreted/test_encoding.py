"""The element-wise kernels in the interpreter: the same codes, scales and â as the definition, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from selection import crossed
from torch import Tensor
from torch.nn import functional as F

from modiff.config.quant import QuantSpec
from modiff.kernels.triton import launch, library  # noqa: F401 (registers the operators)
from modiff.kernels.triton.launch import SAMPLE, SAMPLE_CHANNEL, TENSOR, TOKEN, Codes, Norm
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import Partition

SHAPE = (3, 5, 6, 48)
GRID = (torch.tensor(2.0**-9), torch.tensor(-900.0))
EIGHT = Codes(127, 1.0, symmetric=True, clips=False)
FOUR = Codes(15, 1.0, symmetric=False, clips=True)
CLIPPED = Codes(7, 0.75, symmetric=True, clips=True)
CODES = [EIGHT, FOUR, CLIPPED]
IDS = ["8 bit", "4 bit asymmetric", "4 bit clipped"]


def ranges_of(residual: Tensor, per: int) -> tuple[Tensor, Tensor]:
    dims = {TENSOR: (0, 1, 2, 3), SAMPLE: (1, 2, 3), TOKEN: (3,), SAMPLE_CHANNEL: (1, 2)}[per]
    return residual.amin(dims, keepdim=True), residual.amax(dims, keepdim=True)


def scale_of(low: Tensor, high: Tensor, numbers: Codes, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point by DESIGN's definitions, in float32."""
    top = float(numbers.highest)
    if numbers.symmetric:
        scale = torch.maximum(-low, high) * torch.tensor(numbers.clip / top)
    else:
        low, high = low.clamp(max=0) * numbers.clip, high.clamp(min=0) * numbers.clip
        scale = (high - low) / top
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    if step is not None:
        scale = (scale / step).round().clamp(1, -(-2 * 32767 // numbers.highest)) * step
    zero = torch.zeros_like(scale) if numbers.symmetric else (-low / scale).round().clamp(0, top)
    return scale, zero


def define(
    a: Tensor, held: Tensor | None, grid: tuple[Tensor, Tensor] | None, scale: Tensor, zero: Tensor, numbers: Codes
):
    """Codes less their zero point, and the next â: equations (4), (5) and (13)."""
    residual = residual_of(a, held, grid)
    low = -numbers.highest if numbers.symmetric else 0
    codes = ((residual / scale).round() + zero).clamp(low, numbers.highest) - zero
    if held is None:
        return codes, None
    if grid is None:
        return codes, held + codes * scale
    multiple = (scale / grid[0]).round()
    number = held.float()
    codes = torch.maximum(
        torch.minimum(codes, ((32767 - number) / multiple).floor()), ((-32767 - number) / multiple).ceil()
    )
    return codes, (number + codes * multiple).to(torch.int16)


def residual_of(a: Tensor, held: Tensor | None, grid: tuple[Tensor, Tensor] | None) -> Tensor:
    if held is None:
        return a.float()
    if grid is None:
        return a.float() - held
    step, center = grid
    low, high = (center - 32767) * step, (center + 32767) * step
    return a.float().clamp(low, high) - (held.float() + center) * step


def inputs(kind: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """An input and its reconstruction: floats, whole numbers near the middle, or at the ends of their range."""
    a = torch.randn(SHAPE)
    if kind == "float":
        return a, a + torch.randn(SHAPE) / 10, None
    step, center = GRID
    number = ((a + torch.randn(SHAPE) / 10) / step).round() - center
    if kind == "ends":
        a, number = a * 100, number + 32000 * torch.randn(SHAPE).sign()
    return a, number.clamp(-32767, 32767).to(torch.int16), GRID


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


KINDS = ("float", "int16", "ends", "none")
PERS = (TENSOR, SAMPLE, TOKEN)


@pytest.mark.parametrize(
    ("numbers", "kind", "per"),
    crossed(
        [CODES, KINDS, PERS],
        lambda numbers, kind, per: (CODES.index(numbers) + KINDS.index(kind) + PERS.index(per)) % 3 == 0,
    ),
)
def test_codes_scales_and_the_reconstruction_are_the_definitions(numbers: Codes, kind: str, per: int) -> None:
    a, held, grid = inputs("float" if kind == "none" else kind)
    held = None if kind == "none" else held
    scale, zero = scale_of(*ranges_of(residual_of(a, held, grid), per), numbers, None if grid is None else grid[0])
    expected, advanced = define(a, held, grid, scale, zero, numbers)
    codes, found, probe = encode(a, held, grid, per, numbers)
    assert torch.equal(found, scale.reshape(-1))
    assert torch.equal(codes[:, 1:-1, 2:-1, :48].float(), expected)
    border = codes.clone()
    border[:, 1:-1, 2:-1, :48] = 0
    assert not border.any()  # the poison of every border, and of the channels beyond, was overwritten
    assert advanced is None or torch.equal(held, advanced)
    assert probe == 0


def encode(a: Tensor, held: Tensor | None, grid, per: int, numbers: Codes, scale=None, zero=None, units=None):
    """The way of ``library.quantize``, into poisoned memory with a border."""
    step = None if grid is None else grid[0]
    if scale is None and per != TOKEN:
        lows, highs = launch.ranges(a, held, grid, per_channel=False)
        sets = 1 if per == TENSOR else a.shape[0]
        scale, zero, _ = launch.scales(lows.view(sets, -1), highs.view(sets, -1), step, numbers)
    scale = torch.full((a.shape[:-1].numel(),), float("nan")) if scale is None else scale
    codes = torch.full((a.shape[0], a.shape[1] + 2, a.shape[2] + 3, 64), 99, dtype=torch.int8)
    probes, _, _ = launch.quantize(codes, a, held, grid, scale, zero, units, per, numbers, (1, 2))
    return codes, scale, probes.sum()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    a, held, _ = inputs("float")
    a, other = a.to(dtype), held.clone()
    codes, _, _ = encode(a, held, None, SAMPLE, EIGHT)
    assert torch.equal(codes, encode(a.float(), other, None, SAMPLE, EIGHT)[0])
    assert torch.equal(held, other)


@pytest.mark.parametrize(("a_last", "held_last"), list(itertools.product((True, False), repeat=2)))
@pytest.mark.parametrize("per", [SAMPLE, pytest.param(TOKEN, marks=pytest.mark.slow)])
def test_every_layout_gives_the_same(a_last: bool, held_last: bool, per: int) -> None:
    a, held, _ = inputs("float")
    other = held.clone()
    expected = encode(a, held, None, per, EIGHT)
    a, other = (
        x if last else x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for x, last in ((a, a_last), (other, held_last))
    )
    found = encode(a, other, None, per, EIGHT)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(other, held)


@pytest.mark.parametrize("numbers", CODES, ids=IDS)
def test_known_scales_need_one_pass(numbers: Codes) -> None:
    a, held, _ = inputs("float")
    scale, zero = torch.tensor([0.02]), torch.tensor([3.0 * (not numbers.symmetric)])
    expected, advanced = define(
        a, held.clone(), None, scale, zero, Codes(numbers.highest, 1.0, numbers.symmetric, True)
    )
    codes, _, _ = encode(a, held, None, TENSOR, numbers, scale, None if numbers.symmetric else zero)
    assert numbers is EIGHT or (expected + zero == numbers.highest).any()  # some fall outside
    assert torch.equal(codes[:, 1:-1, 2:-1, :48].float(), expected)
    assert torch.equal(held, advanced)


def test_scales_per_sample_and_channel_come_with_what_one_code_is_worth() -> None:
    a, held, _ = inputs("float")
    scale = 2.0 ** torch.randint(-9, -4, (3, 48)).float()
    units = 2.0 ** torch.randint(0, 4, (3, 48)).float()
    wide = scale[:, None, None]
    expected, advanced = define(a, held.clone(), None, wide, torch.zeros(1), CLIPPED)
    codes, _, _ = encode(a, held, None, SAMPLE_CHANNEL, CLIPPED, scale, None, units)
    assert torch.equal(codes[:, 1:-1, 2:-1, :48].float(), expected * units[:, None, None])
    assert torch.equal(held, advanced)


def test_without_compensation_the_reconstruction_is_the_input() -> None:
    for kind in ("float", "int16"):
        a, held, grid = inputs(kind)
        codes = torch.empty(*SHAPE[:3], 64, dtype=torch.int8)
        scale = torch.tensor([0.5])
        launch.quantize(codes, a, held, grid, scale, None, None, TENSOR, EIGHT, (0, 0), compensates=False)
        assert torch.equal(held, a if grid is None else ((a / grid[0]).round() - grid[1]).to(torch.int16))


BAD = (float("inf"), -float("inf"), float("nan"))


@pytest.mark.parametrize(("bad", "per"), crossed([BAD, PERS], lambda bad, per: BAD.index(bad) == PERS.index(per)))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_one_bad_number_reaches_the_probe(bad: float, per: int) -> None:
    for kind in ("float", "int16"):
        a, held, grid = inputs(kind)
        a[2, 4, 5, 47] = bad
        assert not torch.isfinite(encode(a, held, grid, per, EIGHT)[2])


@pytest.mark.parametrize("numbers", CODES, ids=IDS)
def test_the_measured_range_gives_the_next_scale_with_a_margin(numbers: Codes) -> None:
    a, held, _ = inputs("float")
    residual = residual_of(a, held, None)
    codes = torch.empty(*SHAPE[:3], 64, dtype=torch.int8)
    scale = torch.tensor([0.01])
    zero = None if numbers.symmetric else torch.zeros(1)
    _, lows, highs = launch.quantize(codes, a, held, None, scale, zero, None, TENSOR, numbers, (0, 0), measures=True)
    low, high = ranges_of(residual, SAMPLE)
    assert torch.equal(lows.amin(1), low.reshape(-1))
    assert torch.equal(highs.amax(1), high.reshape(-1))
    found, middle, _ = launch.scales(lows, highs, None, numbers, margin=1.25)
    expected, zero = scale_of(low * 1.25, high * 1.25, numbers, None)
    assert torch.equal(found, expected.reshape(-1))
    assert numbers.symmetric or torch.equal(middle, zero.reshape(-1))


def test_ranges_per_channel() -> None:
    a, held, _ = inputs("float")
    lows, highs = launch.ranges(a, held, None, per_channel=True)
    low, high = ranges_of(a - held, SAMPLE_CHANNEL)
    assert torch.equal(lows.amin(1), low[:, 0, 0])
    assert torch.equal(highs.amax(1), high[:, 0, 0])


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "pixels last"])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu_and_codes_in_one_pass(silu: bool, last: bool) -> None:
    a, held = torch.randn(SHAPE) * 3 + 5, torch.randn(SHAPE)
    gamma, beta, scale = torch.randn(48), torch.randn(48), torch.tensor([0.3])
    image = a.permute(0, 3, 1, 2)
    wide = F.group_norm(image.double(), 4, gamma.double(), beta.double(), 1e-6).permute(0, 2, 3, 1)
    wide = F.silu(wide) if silu else wide
    a = a if last else image.contiguous().permute(0, 2, 3, 1)
    mean, rstd = launch.moments(a, 4, 1e-6)
    codes = torch.full((3, 7, 8, 64), 99, dtype=torch.int8)
    before, norm = held.clone(), Norm("group", "silu" if silu else None, mean, rstd, gamma, beta)
    launch.quantize(codes, a, held, None, scale, None, None, TENSOR, CLIPPED, (1, 1), norm=norm)
    check_near(codes[:, 1:-1, 1:-1, :48], wide, before, held, scale)


@pytest.mark.parametrize("adaptive", [True, False])
def test_layer_norm_and_codes_per_token_in_one_pass(adaptive: bool) -> None:
    a, held = torch.randn(3, 1, 30, 48) * 3 + 5, torch.randn(3, 1, 30, 48)
    mul, add = torch.randn(2, 3, 48) if adaptive else torch.randn(2, 48)
    wide = F.layer_norm(a.double(), (48,), eps=1e-6)
    wide = wide * mul.double().view(-1, 1, 1, 48) + add.double().view(-1, 1, 1, 48)
    codes = torch.full((3, 1, 30, 64), 99, dtype=torch.int8)
    scale, before = torch.full((90,), float("nan")), held.clone()
    norm = Norm("layer", mul=mul, add=add, epsilon=1e-6)
    launch.quantize(codes, a, held, None, scale, None, None, TOKEN, EIGHT, (0, 0), norm=norm)
    expected = (wide - before.double()).abs().amax(3).reshape(-1) / 127
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=0)
    check_near(codes[..., :48], wide, before, held, scale.view(3, 1, 30, 1))


def check_near(codes: Tensor, wide: Tensor, before: Tensor, held: Tensor, scale: Tensor) -> None:
    """Codes are those of the exact normalized value, to its float32 rounding; â advances by exactly the codes."""
    distance = (wide - before.double()) / scale.double()
    inside = distance.abs() < codes.abs().max()
    assert inside.float().mean() > 0.2
    assert ((codes.double() - distance).abs()[inside] < 0.501).all()
    assert torch.equal(held, before + codes.float() * scale)


def limits_of(numbers: Codes, margin: float | None = None, exponent: int = 0) -> Limits:
    spec = QuantSpec({127: 8, 15: 4, 7: 4}[numbers.highest], "sample", numbers.symmetric, clip=numbers.clip)
    powers = torch.tensor([2.0**e for e in range(exponent + 1)])
    return replace(Limits.of(spec, torch.zeros(1)), margin=margin, powers=powers)


@pytest.mark.parametrize("numbers", [CLIPPED, FOUR], ids=IDS[2:0:-1])
@pytest.mark.parametrize("kind", ["float", "int16"])
def test_scales_in_powers_of_two_are_the_definitions(numbers: Codes, kind: str) -> None:
    """Scales, zero points, what one code is worth and codes, bit for bit, with channels a thousand times apart."""
    a, held, grid = inputs(kind)
    factors = 10.0 ** -torch.linspace(0, 3, 48)
    factors[5] = 0
    near = a + factors * torch.randn(SHAPE)
    held = near if grid is None else ((near / grid[0]).round() - grid[1]).clamp(-32767, 32767).to(torch.int16)
    step, residual = None if grid is None else grid[0], residual_of(a, held, grid)
    limits = limits_of(numbers, exponent=3)
    low, high = (t.permute(0, 3, 1, 2) for t in ranges_of(residual, SAMPLE_CHANNEL))
    partition = Partition(keep=(0, 1), shared=(0,))
    shared = limits.shared_scale(low, high, partition, step)
    scale, zero, power, unit = (t if t is None else t.permute(0, 2, 3, 1) for t in shared)
    expected, advanced = define(a, held.clone(), grid, scale, torch.zeros(1) if zero is None else zero, numbers)
    arguments = (None, None, None, SAMPLE_CHANNEL, [1, 1, 2, 1], 64)
    how = (numbers.highest, numbers.clip, numbers.symmetric, numbers.clips, True, 3)
    codes, found, probe = torch.ops.modiff.triton_quantize(a, held, *(grid or (None, None)), *arguments, *how)
    assert torch.equal(found, unit.reshape(-1))
    assert torch.equal(codes[:, 1:-1, 2:-1, :48].float(), expected * power)
    assert torch.equal(held, advanced)
    assert power.unique().numel() > 2
    assert probe == 0


@pytest.mark.parametrize("numbers", [EIGHT, FOUR], ids=IDS[:2])
@pytest.mark.parametrize("kind", ["float", "int16"])
@pytest.mark.parametrize("per", [SAMPLE, pytest.param(TENSOR, marks=pytest.mark.slow)])
def test_the_range_of_the_evaluation_before_gives_the_scale_where_it_fits(numbers: Codes, kind: str, per: int) -> None:
    """Sample 0 fits, sample 1 outgrows its last range and is encoded anew, and sample 2 has no last range."""
    a, held, grid = inputs(kind)
    step, residual = None if grid is None else grid[0], residual_of(a, held, grid)
    low, high = ranges_of(residual, per)
    last = torch.stack([low * 1.5, high * 1.5, torch.ones_like(low)])
    if per == SAMPLE:
        last[:2, 1] /= 4
        last[:, 2] = 0
    kept, limits = last.clone(), limits_of(numbers, margin=1.125)
    scale, zero = limits.scale_after(low, high, kept, step)
    own, _ = scale_of(low, high, numbers, step)
    assert ((scale > own) == torch.tensor([True, False, False]).view_as(scale) if per == SAMPLE else scale > own).all()
    expected, advanced = define(a, held.clone(), grid, scale, torch.zeros(1) if zero is None else zero, numbers)
    ours = last.view(3, -1).clone()
    how = (numbers.highest, numbers.clip, numbers.symmetric, numbers.clips, True, 0, 1.125)
    arguments = (None, None, ours, per, [1, 1, 2, 1], 64)
    codes, found, probe = torch.ops.modiff.triton_quantize(a, held, *(grid or (None, None)), *arguments, *how)
    assert torch.equal(found, scale.reshape(-1))
    assert torch.equal(ours, kept.view(3, -1))
    border = codes.clone()
    border[:, 1:-1, 2:-1, :48] = 0
    assert not border.any()
    assert probe == 0
    if grid is not None:  # whole numbers go back exactly
        assert torch.equal(codes[:, 1:-1, 2:-1, :48].float(), expected)
        assert torch.equal(held, advanced)
        return
    # Floats go back to their rounding: residuals right at the middle between codes may fall to the other side.
    different = codes[:, 1:-1, 2:-1, :48].float() != expected
    assert different.float().mean() < 0.001
    assert not different[0].any()
    torch.testing.assert_close(held[~different], advanced[~different], rtol=0, atol=1e-5)
