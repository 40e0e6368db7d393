"""What ``modiff bench`` makes of its times and of memory: ratios, sentences, peaks."""

from __future__ import annotations

import pytest
import torch

from modiff.lit.bench import clocks as timing
from modiff.lit.bench.arms import COMPILED, EAGER, TEACHER, staged, summary
from modiff.lit.bench.clocks import Stages, peak_memory
from modiff.lit.bench.results import sentence

CPU = torch.device("cpu")
QUICK = ("--compile", "eager", "--rounds", "2", "--evaluations", "2", "--batch_sizes", "2")


def made(whole: float, products: float, modulation: float) -> Stages:
    return Stages(whole, {"a": timing.OperatorTimes(products + modulation, products)})


def test_ratio_is_taken_within_each_round() -> None:
    teacher, student = [[1.0, 1.0, 9.0], [4.0, 4.0, 4.0]], [[2.0, 2.0, 2.0], [2.0, 1.0, 8.0]]
    assert summary(student, teacher)["ratio"]["median"] == (0.5 + 2.0) / 2


@pytest.mark.parametrize(
    ("ratio", "stages_ms", "expected"),
    [
        (
            0.8,
            (50, 60, 30),
            "a is SLOWER than the teacher (0.800 {}: modulation takes 60.0 ms more; the products take 30.0",
        ),
        (
            1.2,
            (40, 10, 30),
            "a is faster than the teacher (1.20 {}: the products take 40.0 ms less; modulation takes 10.0",
        ),
        (
            1.0,
            (80, 5, 20),
            "a is as fast as the teacher within the spread (1.00 {}: modulation takes 5.00 ms more; the rest",
        ),
        (
            0.5,
            (80, 1, 60),
            "a is SLOWER than the teacher (0.500 {}: the rest of the network takes 30.0 ms more; the products",
        ),
    ],
)
def test_sentence_names_the_stage(ratio, stages_ms, expected) -> None:
    keys = ("products_s", "modulation_s", "rest_s")
    entry = {"mode": EAGER, "batch_size": 8, TEACHER: {"stages": dict(zip(keys, (0.08, 0.0, 0.03), strict=True))}}
    student = {
        "ratio": {"median": ratio, "q1": ratio - 0.01, "q3": ratio + 0.01},
        "stages": dict(zip(keys, (value / 1000 for value in stages_ms), strict=True)),
    }
    where = "times the teacher's speed; eager, 8 images per evaluation)"
    assert sentence("a", entry, student).startswith(expected.format(where))


def test_sentence_compares_with_the_teacher_in_bfloat16_too() -> None:
    stages = dict.fromkeys(("products_s", "modulation_s", "rest_s"), 0.1)
    ratios = [{"median": m, "q1": m, "q3": m} for m in (2.5, 1.25)]
    student = {"ratio": ratios[0], "ratio_to_bfloat16": ratios[1], "stages": stages}
    found = sentence("a", {"mode": COMPILED, "batch_size": 1, TEACHER: {"stages": stages}}, student)
    assert "(2.50 times the teacher's speed, 1.25 times that of the teacher in bfloat16; compiled, 1 image per" in found


def test_peak_memory_counts_what_is_freed_again_and_what_an_earlier_call_freed() -> None:
    work = lambda: float(torch.ones(16 * 2**20).sum())  # noqa: E731  64 MiB, freed on return
    for _ in range(2):
        found, how = peak_memory(work, CPU)
        assert 56 < found < 200
        assert "resident memory" in how
    assert peak_memory(lambda: None, CPU)[0] < 16


def test_sampled_memory_sees_what_stays(monkeypatch) -> None:
    monkeypatch.setattr(timing.sys, "platform", "other")
    kept = []
    found, how = peak_memory(lambda: kept.append(torch.ones(16 * 2**20)), CPU)
    assert found > 56
    assert how.endswith("sampled every millisecond")


def test_stages_of_compiled_arms_are_what_remains() -> None:
    turns = {TEACHER: [[10.0, 10.0]], "student": [[12.0, 12.0]]}
    found = {"eager/teacher": made(20.0, 6.0, 0.0), "eager/student": made(30.0, 4.0, 9.0)}

    def figures(arm):
        return tuple(arm[key] for key in ("products_s", "modulation_s", "rest_s"))

    compiled = staged(COMPILED, turns, found)
    assert figures(compiled[TEACHER]) == (6.0, 0.0, 4.0)
    assert figures(compiled["student"]) == (4.0, 4.0, 4.0)
    eager = staged(EAGER, turns, found)
    assert figures(eager[TEACHER]) == (3.0, 0.0, 7.0)
    assert figures(eager["student"]) == pytest.approx((1.6, 3.6, 6.8))
    stages_only = staged(COMPILED, turns, {**found, "compiled/student": made(24.0, 4.0, 6.0)})
    assert figures(stages_only["student"]) == (2.0, 3.0, 7.0)
    assert stages_only["student"]["how"] == eager["student"]["how"] != compiled["student"]["how"]
