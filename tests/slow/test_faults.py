"""Real processes over gloo, disturbed at random moments: the results are those of an undisturbed run, bit for bit.

Rounds of the slow part: MODIFF_FAULT_ROUNDS (3). A hundred rounds and more: benchmarks/faults.py.
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
from pathlib import Path

import pytest
from fault_cases import Bench, Case, difference, results
from fault_recipes import make_recipes, save_images

pytestmark = pytest.mark.timeout(1800)  # the processes have limits of their own; a slow machine may take long
ROUNDS = int(os.environ.get("MODIFF_FAULT_ROUNDS", "3"))
TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_teacher: Path, tiny_features: Path):
    """Recipes of tiny models, and what they give undisturbed."""
    folder = tmp_path_factory.mktemp("faults")
    made = Bench(folder, make_recipes(tiny_teacher, tiny_features, save_images(folder / "data")))
    yield made
    made.close()


def check(bench: Bench, case: Case, seed: int = 0, moments: int = 1) -> None:
    outcome = bench.disturb(case, random.Random(f"{case} {seed}"), moments)
    assert outcome.problems == [], "\n".join(outcome.said[-40:])
    if outcome.signals and case.number == KILL and case.target == "one" and case.ranks > 1:
        named = [line for line in outcome.said if line.startswith("modiff") and "ank " in line and "ended" not in line]
        assert named or "nobody answers for it" in "".join(outcome.said), outcome.said[-40:]


def test_sigterm_to_one_rank_of_two_loses_nothing(bench) -> None:
    check(bench, Case("evaluate", "srun", 2, TERM, "one"))


def test_sigkill_of_one_rank_of_two_loses_nothing(bench) -> None:
    check(bench, Case("evaluate", "srun", 2, KILL, "one"))


def test_two_ranks_train_like_one_with_twice_the_batch(bench) -> None:
    """Noise, time steps and images are those of the image's number; only the order of float sums differs."""
    curves, text = [], (bench.folder / "train.yaml").read_text().replace("dropout: 0.1", "dropout: 0.0")
    for ranks in (1, 2):
        plain = text.replace("batch_size: 4", f"batch_size: {4 // ranks}").replace("max_epochs: 14", "max_steps: 20")
        (bench.folder / "train.yaml").write_text(plain.replace("log_every_n_steps: 10", "log_every_n_steps: 1"))
        case, out = Case("train", "srun", ranks, TERM, "one"), bench.folder / f"curve-{ranks}"
        assert bench.start(case, out, out.with_suffix(".log")).wait(400) == 0, out.with_suffix(".log").read_text()
        rows = csv.DictReader((out / "logs" / "version_0" / "metrics.csv").read_text().splitlines())
        curves.append([float(row["train/loss"]) for row in rows if row["train/loss"]])
    assert len(curves[0]) == len(curves[1]) == 20
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert len(set(curves[0])) == 20


@pytest.mark.slow
def test_three_ranks_that_go_on_add_gradients_up_as_before(bench) -> None:
    """Of two ranks a + b is b + a; the sum of three depends on where DDP puts a gradient."""
    case = Case("train", "srun", 3, TERM, "one")
    wanted = bench.expected(case)
    recipe, out = bench.folder / "train.yaml", bench.folder / "stopped-at-5"
    before = recipe.read_text()
    stop = "callbacks: [{class_path: fault_recipes.TerminateAt, init_args: {steps: 5, rank: 1}}], "
    recipe.write_text(before.replace("trainer: {", f"trainer: {{{stop}"))
    assert bench.start(case, out, out.with_suffix(".log")).wait(400) == 130, out.with_suffix(".log").read_text()
    recipe.write_text(before)
    assert bench.start(case, out, out.with_suffix(".log")).wait(400) == 0, out.with_suffix(".log").read_text()
    assert results("train", out) == wanted, difference(results("train", out), wanted)


COMMANDS = ("evaluate", "compare", "quantize", "train")
CASES = [
    *(Case(c, "srun", r, n, "one") for c, r, n in itertools.product(COMMANDS, (1, 2, 3), (TERM, USR1, KILL))),
    *(Case(c, "srun", r, n, "all") for c, r, n in itertools.product(COMMANDS, (2, 3), (TERM, USR1, KILL))),
    *(Case(c, "plain", 2, n, t) for c, n, t in itertools.product(COMMANDS, (TERM, KILL), ("one", "launcher"))),
    *(Case(c, "torchrun", 2, n, t) for c, n, t in itertools.product(COMMANDS, (TERM, KILL), ("one", "launcher"))),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_fault_loses_nothing(bench, case) -> None:
    for seed in range(ROUNDS):
        check(bench, case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_many_faults_of_one_run_lose_nothing(bench, command) -> None:
    check(bench, Case(command, "srun", 2, TERM, "one"), moments=ROUNDS)
