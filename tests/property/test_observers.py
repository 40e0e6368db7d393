"""Observers: whatever the data and however they are dealt, merged statistics are those of one that saw everything."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff.config.quant import QuantSpec
from modiff.errors import ConfigError
from modiff.quantizers.affine import fake_quantize, scale_from_range
from modiff.quantizers.granularity import Partition
from modiff.quantizers.observers import Histogram, Lp, MinMax, MovingAverage, Percentile, make_observer

settings.register_profile("fast", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("fast")
BINS = 64
KINDS = ("minmax", "moving_average", "percentile", "lp")
BUCKETS, SETS = 2, 3
SPEC = QuantSpec(4, symmetric=False)


@st.composite
def parts(draw, count=3):
    """Batches for as many observers, of magnitudes from 1e-20 to 1e20: (bucket, first set, values)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    found = []
    for _ in range(count):
        batches = []
        for _ in range(draw(st.integers(0, 3))):
            sets = draw(st.integers(1, SETS))
            shape = (draw(st.integers(1, 3)), sets, draw(st.integers(1, 5)))
            values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-20, 20))
            if draw(st.booleans()):
                values *= torch.rand(shape, generator=generator) < 0.5
            first = draw(st.integers(0, SETS - sets))
            batches.append((draw(st.integers(0, BUCKETS - 1)), first, values))
        found.append(batches)
    return found


def observer(kind, batches, bins=BINS):
    made = make_observer(kind, BUCKETS, SETS, bins=bins, percentile=90.0)
    for batch in batches:
        made.update(*batch)
    return made


def merged(first, *others):
    first = copy.deepcopy(first)
    for other in others:
        first.merge(other)
    return first


def same(a, b):
    """All statistics, bit for bit."""
    assert vars(a).keys() == vars(b).keys()
    for key, value in vars(a).items():
        assert torch.equal(value, vars(b)[key]) if isinstance(value, torch.Tensor) else value == vars(b)[key], key


def near(a, b):
    """Sums of float64 in another order."""
    for key, value in vars(a).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, vars(b)[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["minmax", "percentile", "lp"])
@given(parts())
def test_merged_statistics_of_ranks_equal_those_of_one_bit_for_bit(kind, data):
    ranks = [observer(kind, batches) for batches in data]
    whole = observer(kind, [batch for batches in data for batch in batches])
    same(merged(*ranks), whole)
    for found, wanted in zip(merged(*ranks).range(SPEC), whole.range(SPEC), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@given(parts())
def test_merge_is_associative_and_commutative(kind, data):
    a, b, c = (observer(kind, batches) for batches in data)
    check = near if kind == "moving_average" else same
    # Sums of opposite signs and far magnitudes are not exact in any order: the average is of magnitudes here.
    if kind == "moving_average":
        a, b, c = (observer(kind, [(i, j, v.abs()) for i, j, v in batches]) for batches in data)
    check(merged(a, b, c), merged(a, merged(b, c)))
    check(merged(a, b), merged(b, a))


def test_the_moving_average_is_exact_for_values_of_similar_size():
    generator = torch.Generator().manual_seed(0)
    data = [(0, 0, torch.randn(4, SETS, 50, generator=generator)) for _ in range(20)]
    whole = observer("moving_average", data)
    same(merged(observer("moving_average", data[::2]), observer("moving_average", data[1::2])), whole)
    wanted = torch.cat([values for _, _, values in data]).amin(dim=2).double().mean(dim=0)
    torch.testing.assert_close(whole.range(SPEC)[0][0], wanted.float())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_the_other_one_as_it_is(kind):
    data = [(0, 0, torch.randn(2, SETS, 5)), (0, 0, 100 * torch.randn(2, SETS, 5))]
    small, large = (observer(kind, [batch]) for batch in data)
    before = copy.deepcopy(small)
    merged(large, small)
    same(small, before)


@pytest.mark.parametrize("kind", KINDS)
def test_reduced_over_ranks_all_have_what_one_would_have(kind):
    """Three ranks in threads, with an all-reduce of their own."""
    ranks, barrier, board = 3, threading.Barrier(3), {}
    generator = torch.Generator().manual_seed(1)
    data = [
        (i % BUCKETS, 0, torch.randn(2, SETS, 9, generator=generator) * 10.0**i) for i in range(6) for _ in range(ranks)
    ]
    observers = [observer(kind, data[rank::ranks]) for rank in range(ranks)]
    how = {"sum": torch.Tensor.sum, "min": torch.Tensor.amin, "max": torch.Tensor.amax}

    def work(rank):
        def all_reduce(tensor, op):
            board[rank] = tensor.clone()
            barrier.wait()
            found = how[op](torch.stack([board[r] for r in range(ranks)]), dim=0)
            barrier.wait()
            return found

        observers[rank].reduce(all_reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    whole = observer(kind, data)
    for found in observers:
        (near if kind == "moving_average" else same)(found, whole)


@given(parts(count=1))
def test_a_histogram_counts_every_value_in_the_bin_that_holds_it(data):
    found = observer("lp", data[0])
    for bucket in range(BUCKETS):
        for one in range(SETS):
            batches = [v[:, one - f] for b, f, v in data[0] if b == bucket and f <= one < f + v.shape[1]]
            values = torch.cat([v.flatten() for v in batches]).double() if batches else torch.empty(0).double()
            width = found.width[bucket, one]
            assert torch.frexp(width).mantissa == 0.5  # a power of two
            low = (torch.arange(BINS) - BINS // 2) * width
            wanted = ((values[:, None] >= low) & (values[:, None] < low + width)).sum(dim=0)
            assert torch.equal(found.counts[bucket, one], wanted)
            if len(values) and values.abs().max() > 1e-25:  # the bins are as narrow as they can be
                assert values.abs().max() >= width * BINS / 4


def test_min_max_is_the_range_of_all_values():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, SETS, 7, generator=generator) for _ in range(4)]
    low, high = observer("minmax", [(1, 0, values) for values in batches]).range(SPEC)
    every = torch.stack(batches)
    assert torch.equal(low[1], every.amin(dim=(0, 1, 3)))
    assert torch.equal(high[1], every.amax(dim=(0, 1, 3)))
    assert torch.equal(low[0], torch.full((SETS,), float("inf")))  # nothing seen


def test_percentile_leaves_out_as_many_values_at_either_end():
    values = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))] / 1000 - 0.3
    found = Percentile(1, 1, 4096, 99.0)
    found.update(0, 0, values.view(1, 1, -1))
    low, high = found.range(SPEC)
    width = float(found.width)
    # Five values of the thousand are left out at either end; the range goes to the edge of the next one's bin.
    ordered = values.sort().values
    assert ordered[5] - width <= float(low) <= ordered[5]
    assert ordered[-6] <= float(high) <= ordered[-6] + width
    full = Percentile(1, 1, 4096, 100.0)
    full.update(0, 0, values.view(1, 1, -1))
    assert [float(end) for end in full.range(SPEC)] == [float(values.min()), float(values.max())]


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (8, False)])
def test_lp_finds_the_range_of_least_error(bits, symmetric, p):
    """Against the errors of the values themselves, over the same shares of the range."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(20_000, generator=generator).pow(3)
    spec = QuantSpec(bits, symmetric=symmetric)
    found = Lp(1, 1, 8192, p)
    found.update(0, 0, values.view(1, 1, -1))
    low, high = found.range(spec)

    def loss(share):
        clipped = QuantSpec(bits, symmetric=symmetric, clip=share)
        return float((fake_quantize(values.double(), Partition(), clipped) - values).abs().pow(p).sum())

    chosen = loss(float(high) / float(values.max()))
    assert float(low) / float(values.min()) == pytest.approx(float(high) / float(values.max()), rel=1e-6)
    best = min(loss(1 - 0.8 * step / 79) for step in range(80))
    assert best * (1 - 1e-6) <= chosen <= 1.02 * best  # values count as the middles of their bins
    assert chosen < loss(1.0) or bits == 8


def test_symmetric_ranges_have_symmetric_scales():
    found = observer("lp", [(0, 0, torch.randn(2, SETS, 500)), (1, 0, torch.randn(2, SETS, 500))])
    scale, zero_point = scale_from_range(*found.range(QuantSpec(4)), QuantSpec(4))
    assert zero_point is None
    assert (scale > 0).all()


def test_observers_have_names():
    kinds = {"minmax": MinMax, "moving_average": MovingAverage, "percentile": Histogram, "lp": Histogram}
    for name, kind in kinds.items():
        assert isinstance(make_observer(name, 1, 1), kind)
    with pytest.raises(ConfigError, match="ranges is 'max'; allowed are minmax, moving_average, percentile, lp."):
        make_observer("max", 1, 1)
