"""Disturb runs of real processes at random moments, and write what came of it.

python benchmarks/faults.py --rounds 100 --output benchmarks/faults.md
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slow")]

COMMANDS = ("evaluate", "compare", "quantize", "train")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL)


def draw_case(draw: random.Random, launchers: list[str]):
    """A kind of run and of disturbance by chance."""
    from fault_cases import Case

    launcher = draw.choice(launchers)
    ranks = draw.choice((1, 2, 3)) if launcher == "srun" else 2
    target = draw.choice(("one", "all") if launcher == "srun" else ("one", "all", "launcher"))
    number = draw.choice(SIGNALS)
    if launcher == "torchrun" and target == "launcher" and number == signal.SIGUSR1:
        number = signal.SIGTERM  # torchrun does not handle SIGUSR1: it would be a SIGKILL
    return Case(draw.choice(COMMANDS), launcher, ranks, number, target)


def prepare(folder: Path):
    """Tiny models and images."""
    import torch
    from conftest import TINY_UNET
    from fault_cases import Bench
    from fault_recipes import make_recipes, save_images

    from modiff.lit.modules.teacher import LitTeacher
    from modiff.metrics.features import FeatureClassifier

    torch.manual_seed(0)
    LitTeacher(TINY_UNET, {"num_train_timesteps": 100}).export(folder / "teacher")
    FeatureClassifier(width=4, num_features=4, name="tiny-features").save(folder / "features.safetensors")
    recipes = make_recipes(folder / "teacher", folder / "features.safetensors", save_images(folder / "data"))
    return Bench(folder, recipes)


def table(rounds: list[dict]) -> str:
    """Markdown: a row for each command and signal."""
    groups = defaultdict(list)
    for one in rounds:
        groups[one["command"], one["number"]].append(one)
    lines = ["| command | signal | rounds | hit a running process | results equal | gone after, s: median, most |"]
    lines.append("|---|---|---|---|---|---|")
    for (command, number), found in sorted(groups.items()):
        gone = [seconds for one in found for seconds in one["gone_s"]]
        times = f"{statistics.median(gone):.1f}, {max(gone):.1f}" if gone else "-"
        hit, equal = sum(one["signals"] > 0 for one in found), sum(not one["problems"] for one in found)
        lines.append(f"| {command} | {number} | {len(found)} | {hit} | {equal} | {times} |")
    return "\n".join(lines)


def page(rounds: list[dict], seed: int) -> str:
    """The page of this benchmark."""
    kinds = Counter((one["launcher"], one["ranks"]) for one in rounds)
    started = ", ".join(f"{launcher} with {ranks}: {count}" for (launcher, ranks), count in sorted(kinds.items()))
    bad = [one for one in rounds if one["problems"]]
    wrong = "\n".join(f"- {one['case']}: {'; '.join(one['problems'])}" for one in bad) or "None."
    return f"""# Disturbed runs

`python benchmarks/faults.py --rounds {len(rounds)} --seed {seed}`: each round starts a run of a tiny model, sends a
signal at a random moment to one rank, to all of them, or to what started them, waits until every process is gone,
starts the same command again, and compares images, metrics, students or weights with those of an undisturbed run, bit
for bit; evaluations and comparisons with that of one rank. `srun`: ranks with SLURM's variables, without a launcher
that would help; `plain`: Lightning starts the ranks.

{len(rounds)} rounds (launcher and ranks: {started}); {sum(one["signals"] for one in rounds)} signals reached a running
process; {len(rounds) - len(bad)} rounds ended with equal results and a right `run.json`.

{table(rounds)}

What went wrong:

{wrong}
"""


def main() -> int:
    """Run the rounds; the page is written after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", default=["srun"], choices=["srun", "plain", "torchrun"])
    parser.add_argument("--minutes", type=float, default=1e9, help="Stop after the round in which they are over.")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "faults.md")
    options = parser.parse_args()
    draw, rounds, begin = random.Random(options.seed), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modiff-faults-") as folder:
        bench = prepare(Path(folder))
        while len(rounds) < options.rounds and time.monotonic() - begin < 60 * options.minutes:
            case = draw_case(draw, options.launchers)
            outcome = bench.disturb(case, draw)
            kept = ("signals", "codes", "gone_s", "problems")
            facts = {"case": str(case), "command": case.command, "launcher": case.launcher, "ranks": case.ranks}
            rounds.append({**facts, "number": case.number.name, **{key: getattr(outcome, key) for key in kept}})
            print(json.dumps(rounds[-1]), flush=True)
            if outcome.problems:
                print("\n".join(outcome.said[-25:]), flush=True)
            options.output.write_text(page(rounds, options.seed))
        bench.close()
    return int(any(one["problems"] for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
