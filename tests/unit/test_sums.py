"""Sums over images: the same bits in any order, on any number of ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modiff.metrics.feature_outputs import FeatureOutputs, class_scores
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.sums import MeanOverImages, add, empty, merge, value
from tests.unit.feature_networks import SETS, D, Pixels, filled, images

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


def total(terms: list[float]) -> torch.Tensor:
    found = empty()
    for term in terms:
        found = add(found, torch.tensor(term, dtype=torch.float64))
    return found


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=30))
def test_sums_are_those_of_fractions(terms):
    exact = sum(map(Fraction, terms), Fraction(0))
    scale = sum(map(abs, terms))
    assert abs(Fraction(float(value(total(terms)))) - exact) <= abs(exact) * 2**-52 + Fraction(scale) * 2**-98


def test_order_and_ranks_leave_no_trace():
    terms = (torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 5).tolist()
    whole = value(total(terms))
    assert float(whole) == math.fsum(terms)
    assert sum(terms) != math.fsum(terms)  # where plain float64 does leave one
    assert torch.equal(value(total(terms[::-1])), whole)
    for ranks in (2, 3, 7):
        assert torch.equal(value(merge(torch.stack([total(terms[i::ranks]) for i in range(ranks)]))), whole)


def test_what_is_not_finite_stays_not_finite():
    assert not value(total([1.0, math.inf, 2.0])).isfinite()
    assert not value(total([1.0, math.nan])).isfinite()


def test_mean_over_images():
    mean = MeanOverImages()
    mean.update(torch.empty(0))
    assert mean.compute() is None
    mean.update(torch.tensor([1.0, 2.0]))
    mean.update(torch.tensor([6.0]))
    assert mean.compute() == 3.0


@pytest.mark.parametrize("ranks", [2, 3])
def test_figures_of_the_same_batches_are_equal_bit_for_bit_on_any_number_of_ranks(ranks):
    batches = [{source: images[i : i + 8] for source, images in SETS.items()} for i in range(0, 40, 8)]
    whole = ImageFidelity(Pixels())
    for batch in batches:
        filled(whole, batch)
    parts = []
    for rank in range(ranks):
        parts.append(ImageFidelity(Pixels()))
        for batch in batches[rank::ranks]:
            filled(parts[-1], batch)
    for part in parts[1:]:
        parts[0].merge_state(part)
    found, expected = parts[0].compute(), whole.compute()
    assert found["teacher"] == expected["teacher"]
    assert found["student"] == expected["student"]


class ManyClasses(Pixels):
    """As many class scores as Inception has: enough for PyTorch to share the work on them among threads."""

    num_classes = 1008
    weight = torch.randn(1008, D, generator=torch.Generator().manual_seed(0))

    def outputs(self, images):
        found = super().outputs(images)
        return FeatureOutputs(found.features, found.spatial, class_scores(found.features.clone(), self.weight))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_figures_do_not_depend_on_threads(threads):
    """Lightning and torchrun give each of several ranks fewer threads than a single one has."""
    found = []
    for count, ranks in ((1, 1), (2, 1), (1, 2), (1, 3), (2, 3)):
        threads(count)
        parts = [ImageFidelity(ManyClasses()) for _ in range(ranks)]
        for batch, size in enumerate((64, 5, 40, 64)):
            filled(parts[batch % ranks], {who: images(size, batch) for who in ("teacher", "student")}, 64)
        for part in parts[1:]:
            parts[0].merge_state(part)
        found.append(parts[0].compute())
    assert all(one == found[0] for one in found)
    assert found[0]["student"]["inception_score"] > 1
