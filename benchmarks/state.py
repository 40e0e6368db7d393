"""State in fewer bytes against quality, packaged teacher, three seeds: writes state.md and state.json beside itself.

python benchmarks/state.py [--seeds 0 1 2] [--num_images 64] [--output runs/state]

Interrupted, it goes on where it stopped. Every row is a run of `modiff evaluate`; its command stands in the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import modiff
from modiff.lit.callbacks.provenance import device_name
from modiff.lit.commands.evaluate import StudentCLI, evaluate_recipe
from modiff.operators.modulated import ModulatedOperator
from modiff.teachers.zoo import TeacherSpec, load_teacher

HERE = Path(__file__).parent
RECIPE = "recipes/mnist/w8a4_modiff.yaml"
BITS = (8, 6, 4)
MODULATION = "--model.config.modulation."
STATES = {
    "float32": [],
    "â int16": [f"{MODULATION}reconstruction_dtype", "int16"],
    "â int16, ô float16": [f"{MODULATION}reconstruction_dtype", "int16", f"{MODULATION}state_dtype", "float16"],
}
ALLOWED_DB, ALLOWED_SHARE = 0.3, 0.5


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/state"))
    args = parser.parse_args()
    rows = []
    for bits in BITS:
        for state, options in STATES.items():
            for seed in args.seeds:
                folder = args.output / f"seed{seed}" / f"a{bits}_{list(STATES).index(state)}"
                shared = ["--seed", str(seed), "--num_images", str(args.num_images)]
                shared += ["--timing_rounds", "0", "--error_images", "0", "--wandb", "disabled"]
                command = ["--config", RECIPE, "--model.preset", f"w8a{bits}-modiff-paper", *options, *shared]
                cli = StudentCLI("evaluate", [*command, "--output", str(folder)])
                metrics = evaluate_recipe(cli, args.output / f"seed{seed}" / "teacher").as_json()
                row = {"bits": bits, "state": state, "seed": seed, "psnr_db": metrics["student"]["psnr_db"]}
                row["state_mib_per_image"] = metrics["cost"]["state_mib_per_image"]
                rows.append({**row, "command": "modiff evaluate " + " ".join(command)})
                print(row, flush=True)
    provenance = {**metrics["provenance"], "device": device_name(cli.model.device)}
    provenance["unshared_mib_per_image"] = unshared_mib()
    (HERE / "state.json").write_text(json.dumps({"provenance": provenance, "rows": rows}, indent=1) + "\n")
    (HERE / "state.md").write_text(markdown(rows, args, provenance))


def unshared_mib() -> float:
    """State of the demo's student in float32, every operator with an â of its own, in MiB per image."""
    student = modiff.quantize(load_teacher(TeacherSpec("mnist")).denoiser, modiff.QuantConfig.preset("w8a8-modiff"))
    shares, ModulatedOperator.shares = ModulatedOperator.shares, property(lambda _: False)  # type: ignore[assignment]
    try:
        with modiff.trajectory(student) as run:
            student(torch.zeros(1, 1, 32, 32), torch.tensor(999))
            return run.state_bytes / 2**20
    finally:
        ModulatedOperator.shares = shares  # type: ignore[method-assign]


def markdown(rows: list[dict[str, Any]], args: argparse.Namespace, provenance: dict[str, Any]) -> str:
    """The table, and whether the targets were met."""
    seeds = " ".join(map(str, args.seeds))
    lines = [
        "# State in fewer bytes, packaged MNIST teacher",
        "",
        f"    python benchmarks/state.py --seeds {seeds} --num_images {args.num_images}",
        "",
        f"W8, modulated, presets, DDIM 50 steps, {args.num_images} images, seeds {seeds}: PSNR to the teacher's images "
        "in dB, mean ± half the spread; in brackets the mean change against float32 state of the same seed. "
        f"Machine: {provenance['device']}, {provenance['threads']} thread(s), torch {provenance['torch']}. In all "
        "three, operators that read the same tensor share one â.",
        "",
        "| activations | " + " | ".join(STATES) + " |",
        "|---|" + "---|" * len(STATES),
    ]
    worst = 0.0
    for bits in BITS:
        cells = []
        base = {r["seed"]: r["psnr_db"] for r in rows if r["bits"] == bits and r["state"] == "float32"}
        for state in STATES:
            found = {r["seed"]: r["psnr_db"] for r in rows if r["bits"] == bits and r["state"] == state}
            change = statistics.fmean(found[s] - base[s] for s in found)
            spread = (max(found.values()) - min(found.values())) / 2
            cells.append(f"{statistics.fmean(found.values()):.2f} ± {spread:.2f} ({change:+.2f})")
            if state == list(STATES)[-1]:
                worst = min(worst, change)
        lines.append(f"| A{bits} | " + " | ".join(cells) + " |")
    sizes = {s: next(r["state_mib_per_image"] for r in rows if r["state"] == s) for s in STATES}
    lines.append("| state, MiB per image | " + " | ".join(f"{sizes[s]:.3f}" for s in STATES) + " |")
    share = sizes[list(STATES)[-1]] / provenance["unshared_mib_per_image"]
    lines += [
        "",
        "* State of the smallest, of both caches in float32 "
        f"({provenance['unshared_mib_per_image']:.3f} MiB, no â shared): "
        f"{share:.3f}, target at most {ALLOWED_SHARE}: "
        f"{_met(share <= ALLOWED_SHARE)}.",
        f"* Largest loss: {-worst:.2f} dB, target at most {ALLOWED_DB}: {_met(-worst <= ALLOWED_DB)}.",
    ]
    notes = HERE / "state_notes.md"
    return "\n".join(lines) + "\n" + ("\n" + notes.read_text() if notes.exists() else "")


def _met(yes: bool) -> str:
    return "met" if yes else "not met"


if __name__ == "__main__":
    main()
