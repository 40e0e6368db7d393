"""Fréchet distances, inception score, precision and recall against plain numpy and scipy."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

from modiff.errors import ConfigError
from modiff.metrics.features import (
    FeatureOutputs,
    count_features,
)
from modiff.metrics.fidelity import FeatureStatistics, ImageFidelity, frechet_distance
from modiff.metrics.precision_recall import _squared_distances, precision_recall, priorities
from tests.unit.feature_networks import SETS, D, K, Pixels, Plain, S, filled, images, numpy_frechet


def numpy_precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    def covered(points: np.ndarray, by: np.ndarray) -> float:
        inside = 0
        for p in points:
            hit = False
            for c in by:
                radius = np.sort(np.linalg.norm(by - c, axis=1))[k]
                hit |= bool(np.linalg.norm(p - c) <= radius)
            inside += hit
        return inside / len(points)

    return covered(fake, real), covered(real, fake)


def numpy_inception_score(logits: np.ndarray) -> float:
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def test_every_figure_equals_numpy_and_scipy():
    result = filled(ImageFidelity(Pixels())).compute()
    flat = {source: pictures.flatten(1).numpy() for source, pictures in SETS.items()}
    pooled = {s: x[:, :D] for s, x in flat.items()}
    spatial = {s: x[:, D : D + S] for s, x in flat.items()}
    for source in ("teacher", "student"):
        row = result[source]
        assert row["fid"] == pytest.approx(numpy_frechet(pooled["reference"], pooled[source]), abs=1e-6)
        assert row["sfid"] == pytest.approx(numpy_frechet(spatial["reference"], spatial[source]), abs=1e-6)
        score = numpy_inception_score(8 * flat[source][:, D + S : D + S + K])
        assert row["inception_score"] == pytest.approx(score, abs=1e-6)
        expected = numpy_precision_recall(pooled["reference"], pooled[source])
        assert (row["precision"], row["recall"]) == pytest.approx(expected, abs=1e-12)
    student = result["student"]
    assert student["fid_to_teacher"] == pytest.approx(numpy_frechet(pooled["teacher"], pooled["student"]), abs=1e-6)
    assert student["sfid_to_teacher"] == pytest.approx(numpy_frechet(spatial["teacher"], spatial["student"]), abs=1e-6)
    expected = numpy_precision_recall(pooled["teacher"], pooled["student"])
    assert (student["precision_to_teacher"], student["recall_to_teacher"]) == pytest.approx(expected, abs=1e-12)
    assert 0 < student["precision"] < 1  # or the comparison above says little
    assert 0 < student["recall"] < 1
    assert result["reasons"] == {}
    assert result["features"] == {
        "network": "pixels",
        "num_features": D,
        "num_images": 40,
        "num_reference_images": 60,
    }


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all:UserWarning")
def test_inception_score_equals_torchmetrics_without_splits():
    logits = nn.Module()
    logits.forward = lambda x: Pixels().outputs(x).logits.double()
    theirs = InceptionScore(feature=logits, splits=1)
    theirs.update(SETS["student"])
    with pytest.warns(UserWarning, match="degrees of freedom"):  # it also wants a deviation over its one split
        expected = float(theirs.compute()[0])
    ours = filled(ImageFidelity(Pixels()), {"student": SETS["student"]}).compute()["student"]["inception_score"]
    assert ours == pytest.approx(expected, abs=1e-9)


def test_equal_images_are_at_distance_zero():
    result = filled(ImageFidelity(Pixels()), {"teacher": SETS["teacher"], "student": SETS["teacher"]}).compute()
    student = result["student"]
    assert 0 <= student["fid_to_teacher"] < 1e-9
    assert (student["precision_to_teacher"], student["recall_to_teacher"]) == (1.0, 1.0)


def test_correlated_features_keep_the_parity():
    """Wide, nearly singular covariances with a large mean: where float32 or a naive sum would fail."""
    mixing = np.random.default_rng(0).normal(size=(3, 12))
    a = np.random.default_rng(1).normal(size=(100, 3)) @ mixing + 100
    a += 0.1 * np.random.default_rng(2).normal(size=a.shape)
    b = 1.2 * a[::-1] + 0.1 * np.random.default_rng(3).normal(size=a.shape)
    ours = [FeatureStatistics.from_features(torch.from_numpy(x.copy())) for x in (a, b)]
    assert frechet_distance(*ours) == pytest.approx(numpy_frechet(a, b), rel=1e-9, abs=1e-6)


def test_batches_and_their_order_do_not_matter():
    whole = filled(ImageFidelity(Pixels()), batch=1000).compute()
    shuffled = {source: x[torch.randperm(len(x))] for source, x in reversed(SETS.items())}
    parts = filled(ImageFidelity(Pixels()), shuffled, batch=7).compute()
    for source in ("teacher", "student"):
        assert parts[source] == pytest.approx(whole[source], abs=1e-9)
    assert parts["features"] == whole["features"]


@pytest.mark.parametrize("indexed", [False, True])
def test_kept_features_are_bounded_and_the_same_in_any_order(indexed):
    def kept(order: Tensor, batch: int) -> Tensor:
        metric = ImageFidelity(Pixels(), max_kept=10)
        for rows in order.split(batch):
            metric.update(pictures[rows], "student", rows if indexed else None)
            assert sum(len(part) for part in metric.student_kept) <= 20 + batch
        return metric._kept("student")[0]

    pictures = images(90, 5)
    first, second = kept(torch.arange(90), 8), kept(torch.randperm(90), 13)
    assert first.shape == (10, D)
    assert torch.equal(first, second)
    assert not torch.equal(first.sort(dim=0).values, pictures[:10].flatten(1)[:, :D].sort(dim=0).values)


def test_priorities_are_spread_evenly():
    """The smallest tenth of a thousand consecutive indices is not one end of them."""
    smallest = priorities(torch.zeros(1000, 2), torch.arange(1000)).argsort()[:100]
    assert 400 < smallest.double().mean() < 600
    assert len(priorities(torch.rand(1000, 3)).unique()) == 1000


def test_precision_recall_finds_repeated_points():
    """A collapsed set has balls of radius zero; points that lie exactly there are still inside."""
    points = torch.rand(50, 33, generator=torch.Generator().manual_seed(0))
    collapsed = points.repeat_interleave(4, dim=0)
    assert precision_recall(collapsed, points) == (1.0, 1.0)
    assert precision_recall(collapsed, points + 1e-3)[0] == 0.0
    far = points.double() * 1000  # where rounding leaves about 1e-9 of |x|^2 + |y|^2 - 2 x y
    assert _squared_distances(far, far).diagonal().count_nonzero() == 0
    assert _squared_distances(far, far).count_nonzero() == 50 * 49


def test_precision_recall_in_chunks():
    a, b = torch.rand(50, 4, dtype=torch.float64), torch.rand(30, 4, dtype=torch.float64)
    assert precision_recall(a, b, chunk=7) == precision_recall(a, b)


def test_precision_recall_needs_neighbours():
    with pytest.raises(ConfigError, match="at least 4 images on each side, got 3"):
        precision_recall(torch.rand(3, 2), torch.rand(9, 2))


def test_merged_ranks_equal_one():
    halves = [{s: x[i::2] for s, x in SETS.items()} for i in range(2)]
    first, second = (filled(ImageFidelity(Pixels()), half) for half in halves)
    first.merge_state(second)
    whole = filled(ImageFidelity(Pixels())).compute()
    for source in ("teacher", "student"):
        assert first.compute()[source] == pytest.approx(whole[source], abs=1e-9)


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sets = {"reference": SETS["reference"][rank::2], "teacher": SETS["teacher"][rank::2]}
    if rank == 0:
        sets["student"] = SETS["student"]  # rank 1 draws no image of the student
    torch.save(filled(ImageFidelity(Pixels()), sets).compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over a file store")
def test_two_processes_equal_one(tmp_path):
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    finally:
        os.environ.pop("PYTHONPATH") if paths is None else os.environ.update(PYTHONPATH=paths)
    whole = filled(ImageFidelity(Pixels())).compute()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["features"] == whole["features"]
        for source in ("teacher", "student"):
            assert result[source] == pytest.approx(whole[source], abs=1e-9)


def test_a_figure_that_cannot_be_given_is_none_with_a_reason():
    sets = {"teacher": SETS["teacher"][:12], "student": SETS["student"][:10]}
    result = filled(ImageFidelity(Pixels()), sets).compute()
    assert result["teacher"]["fid"] is None
    assert result["reasons"]["teacher.fid"] == "no reference images or statistics were given"
    assert result["student"]["fid_to_teacher"] is None
    few = "12 student images are needed, 10 were drawn (twice the 6 features of pixels)"
    assert result["reasons"]["student.fid_to_teacher"] == few
    assert result["student"]["sfid_to_teacher"] is not None  # 2 x 5 spatial features
    assert result["features"]["num_images"] == 10
    nulls = {f"{s}.{key}" for s in ("teacher", "student") for key, value in result[s].items() if value is None}
    assert nulls == set(result["reasons"])


def test_images_with_nan_give_none():
    broken = SETS["student"].clone()
    broken[3] = float("nan")
    result = filled(ImageFidelity(Pixels()), {**SETS, "student": broken}).compute()
    assert set(result["student"].values()) == {None}
    assert result["reasons"]["student.fid"] == "the features of the student images hold NaN or Inf"
    assert result["teacher"]["fid"] is not None


def test_only_a_teacher():
    result = filled(ImageFidelity(Pixels()), {"teacher": SETS["teacher"]}).compute()
    assert result["reasons"]["student.fid_to_teacher"] == "no student images were drawn"
    assert result["features"]["num_images"] == 40


def test_plain_network_offers_features_only():
    metric = filled(ImageFidelity(Plain(), num_features=D))
    result = metric.compute()
    assert result["teacher"]["fid"] == pytest.approx(filled(ImageFidelity(Pixels())).compute()["teacher"]["fid"])
    assert result["teacher"]["sfid"] is None
    assert result["reasons"]["teacher.sfid"] == "feature network 'Plain' has no spatial features"
    assert result["reasons"]["teacher.inception_score"] == "feature network 'Plain' has no class scores"


def test_reference_statistics_equal_reference_images(tmp_path):
    drawn = filled(ImageFidelity(Pixels()))
    path = tmp_path / "statistics.safetensors"
    drawn.statistics("reference").save(path)
    sets = {s: SETS[s] for s in ("teacher", "student")}
    result = filled(ImageFidelity(Pixels(), FeatureStatistics.load(path)), sets).compute()
    for key in ("fid", "sfid"):
        assert result["student"][key] == pytest.approx(drawn.compute()["student"][key], abs=1e-12)
    assert result["reasons"]["student.precision"].endswith("these statistics hold none of their features")
    assert result["features"]["num_reference_images"] == 60


def test_reference_statistics_with_features_give_precision_and_recall(tmp_path):
    drawn = filled(ImageFidelity(Pixels()))
    path = tmp_path / "statistics.safetensors"
    drawn.statistics("reference", with_features=True).save(path)
    sets = {s: SETS[s] for s in ("teacher", "student")}
    result, expected = filled(ImageFidelity(Pixels(), FeatureStatistics.load(path)), sets).compute(), drawn.compute()
    for source in sets:
        for key in ("precision", "recall"):
            assert result[source][key] == expected[source][key] is not None
    few = drawn.statistics("reference", with_features=True)
    few = dataclasses.replace(few, features=few.features[:3])
    result = filled(ImageFidelity(Pixels(), few), sets).compute()
    assert result["reasons"]["teacher.recall"] == "4 reference images are needed, 3 were given"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.rand(9, D + 1), rf"need the shape \[K, {D}\], as wide as their mean; got \[9, {D + 1}\]"),
        (torch.full((9, D), float("nan")), r"features of feature statistics hold NaN or Inf"),
    ],
)
def test_features_of_statistics_must_fit(features, message):
    with pytest.raises(ConfigError, match=message):
        FeatureStatistics(torch.zeros(D), torch.eye(D), 9, features=features)


def test_reference_without_spatial_features_gives_no_sfid():
    reference = FeatureStatistics.from_features(torch.rand(30, D), "pixels")
    result = filled(ImageFidelity(Pixels(), reference), {"teacher": SETS["teacher"]}).compute()
    assert result["teacher"]["fid"] is not None
    assert result["reasons"]["teacher.sfid"] == "the reference statistics hold no spatial features"


def test_reset_forgets_all_images():
    metric = filled(ImageFidelity(Pixels()))
    expected = metric.compute()
    metric.reset()
    assert filled(metric).compute()["student"] == expected["student"]


def test_network_runs_once_per_batch_without_gradients_in_float32_and_stays_in_eval():
    calls = []

    class Counting(Pixels):
        def outputs(self, images: Tensor) -> FeatureOutputs:
            product = images.flatten(1) @ torch.eye(16)
            calls.append((self.training, torch.is_grad_enabled(), product.dtype))
            return super().outputs(images)

    metric = ImageFidelity(Counting()).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(SETS["student"][:4].requires_grad_(), "student")
    SETS["student"].requires_grad_(False)
    metric.compute()
    assert calls == [(False, False, torch.float32)]


@pytest.mark.parametrize(
    ("pictures", "source", "message"),
    [
        (images(2, 0), "pupil", "one of teacher, student, reference; got 'pupil'"),
        (images(2, 0)[0], "student", r"float \[N, C, H, W\] in \[0, 1\]; got torch.float32 \[1, 4, 4\]"),
        ((images(2, 0) * 255).byte(), "student", "got torch.uint8 .* Divide 8-bit images by 255"),
        (images(2, 0) * 2 - 1, "student", r"must lie in \[0, 1\]; got \[-0.9"),
        (images(2, 0)[:, :, :1, :3], "student", r"'pixels' should return 6 features per image; got \[2, 3\]"),
    ],
)
def test_bad_images_are_refused(pictures, source, message):
    with pytest.raises(ConfigError, match=message):
        ImageFidelity(Pixels()).update(pictures, source)


def test_reference_twice_is_refused():
    metric = ImageFidelity(Pixels(), FeatureStatistics.from_features(torch.rand(30, D)))
    with pytest.raises(ConfigError, match="either statistics or reference images"):
        metric.update(images(2, 0), "reference")


def test_unknown_feature_count_is_refused():
    with pytest.raises(ConfigError, match="'Plain' does not say how many features"):
        ImageFidelity(Plain())
    assert count_features(Plain(), images(2, 0)) == D
    reference = FeatureStatistics.from_features(torch.rand(30, D))
    assert ImageFidelity(Plain(), reference).num_features == D


def test_too_few_kept_features_are_refused():
    with pytest.raises(ConfigError, match="max_kept must be at least 4, got 3"):
        ImageFidelity(Pixels(), max_kept=3)
