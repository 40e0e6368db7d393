"""Whether a change made students slower: `modiff bench` of one recipe from two checkouts, in turns.

    git worktree add ../old TAG
    python benchmarks/two_checkouts.py ../old . --recipe recipes/bench/ddpm_cifar10_w8a7.yaml --pairs 4 \
        -- --batch_sizes 8 --threads 1

Each pair runs the old checkout and then the new one, as processes of their own with the same interpreter; what stands
after `--` goes to `modiff bench`. Of every arm that both report it writes the median over all rounds of all pairs, the
ratio of the two medians (below 1: the new one is faster), and the ratio of each pair. The teacher's arms are the same
code in both and show the noise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run the pairs, print the table, and write it to --json where it is given."""
    args, bench = split(list(sys.argv[1:] if argv is None else argv))
    times: dict[str, dict[str, list[list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            for side, checkout in (("old", args.old), ("new", args.new)):
                out = Path(folder) / f"{side}{pair}"
                for arm, seconds in run(checkout, args.recipe, bench, out).items():
                    times.setdefault(arm, {"old": [], "new": []})[side].append(seconds)
                print(f"pair {pair + 1} of {args.pairs}: {side} done", flush=True)
    rows = [row(arm, sides) for arm, sides in times.items() if sides["old"] and sides["new"]]
    for line in rows:
        ratios = ", ".join(f"{ratio:.3f}" for ratio in line["pairs"])
        print(f"{line['arm']:<60}{line['old_ms']:9.1f} ms {line['new_ms']:9.1f} ms  {line['ratio']:.3f}  ({ratios})")
    if args.json:
        facts = {"recipe": args.recipe, "bench": bench, "pairs": args.pairs, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def split(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what stands after ``--``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="Checkout to compare with.")
    parser.add_argument("new", type=Path, help="Checkout with the change.")
    parser.add_argument("--recipe", default="recipes/bench/ddpm_cifar10_w8a7.yaml", help="Within each checkout.")
    parser.add_argument("--pairs", type=int, default=4, help="Runs of each checkout.")
    parser.add_argument("--json", type=Path, default=None, help="File to write.")
    mark = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:mark]), argv[mark + 1 :]


def run(checkout: Path, recipe: str, bench: list[str], out: Path) -> dict[str, list[float]]:
    """One `modiff bench`; the seconds of every round by arm."""
    script = re.search(r'^modiff = "([\w.]+):(\w+)"$', (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    if script is None:
        raise SystemExit(f"{checkout}/pyproject.toml names no `modiff` command.")
    module, function = script.groups()
    start = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "bench", recipe, *bench, "--output", str(out)]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: `modiff bench` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    arms: dict[str, list[float]] = {}
    for entry in json.loads((out / "bench.json").read_text())["results"]:
        for name, arm in {"teacher": entry["teacher"], **entry["students"]}.items():
            turns = (arm.get("seconds") or {}).get("values", [])
            if turns:
                arms[f"{name}, batch {entry['batch_size']}, {entry['mode']}"] = [s for turn in turns for s in turn]
    return arms


def row(arm: str, sides: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians over all rounds, and the ratio of every pair's medians."""
    old, new = ([s for seconds in sides[side] for s in seconds] for side in ("old", "new"))
    pairs = [statistics.median(b) / statistics.median(a) for a, b in zip(sides["old"], sides["new"], strict=True)]
    return {
        "arm": arm,
        "old_ms": 1e3 * statistics.median(old),
        "new_ms": 1e3 * statistics.median(new),
        "ratio": statistics.median(new) / statistics.median(old),
        "pairs": pairs,
    }


if __name__ == "__main__":
    sys.exit(main())
