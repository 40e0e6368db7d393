"""Bits against quality on the packaged teacher, three seeds: writes mnist_bits.md and mnist_bits.json beside itself.

python benchmarks/mnist_bits.py [--seeds 0 1 2] [--num_images 64] [--output runs/mnist_bits]

Interrupted, it goes on where it stopped. Every row is a run of `modiff evaluate`; its command stands in the JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from modiff.lit.callbacks.provenance import device_name
from modiff.lit.commands.evaluate import StudentCLI, evaluate_recipe

HERE = Path(__file__).parent
RECIPE = "recipes/mnist/w8a4_modiff.yaml"  # the presets below replace its own
BITS = (8, 6, 4, 3, 2)
ARMS = {
    "ptq": [],
    "no compensation": ["--model.config.modulation.error_compensation", "false"],
    "modiff": [],
}
OTHER_SYMMETRY = "other"
METRICS = ("psnr_db", "relative_l2", "fid_to_teacher", "fid")


def rows() -> list[tuple[str, int, str, list[str]]]:
    """Arm, bits, symmetry (preset or the other one), options of every row."""
    found = []
    for bits in BITS:
        for arm, options in ARMS.items():
            preset = f"w8a{bits}-{'ptq' if arm == 'ptq' else 'modiff'}-paper"
            found.append((arm, bits, "preset", ["--model.preset", preset, *options]))
    for bits in BITS:
        for arm in ("ptq", "modiff"):
            symmetric = arm == "ptq" or bits < 6
            options = [
                "--model.preset",
                f"w8a{bits}-{arm}-paper",
                "--model.config.activation.symmetric",
                str(symmetric).lower(),
            ]
            found.append((arm, bits, OTHER_SYMMETRY, options))
    return found


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/mnist_bits"))
    parser.add_argument("--part", choices=("all", "preset", OTHER_SYMMETRY), default="all", help="to run two at once")
    args = parser.parse_args()
    results = []
    for arm, bits, symmetry, options in rows():
        if args.part not in ("all", symmetry):
            continue
        for seed in args.seeds:
            folder = args.output / f"seed{seed}" / f"{arm}_{bits}_{symmetry}".replace(" ", "_")
            shared = ["--seed", str(seed), "--num_images", str(args.num_images)]
            shared += ["--timing_rounds", "0", "--error_images", "0", "--wandb", "disabled"]
            command = ["--config", RECIPE, *options, *shared]
            cli = StudentCLI("evaluate", [*command, "--output", str(folder)])
            metrics = evaluate_recipe(cli, args.output / f"seed{seed}" / "teacher").as_json()
            student = {key: metrics["student"][key] for key in METRICS}
            row = {"arm": arm, "bits": bits, "symmetry": symmetry, "seed": seed, **student}
            row["teacher_fid"] = metrics["teacher"]["fid"]
            row["command"] = "modiff evaluate " + " ".join(command)
            results.append(row)
            print({k: row[k] for k in ("arm", "bits", "symmetry", "seed", "psnr_db")}, flush=True)
    if args.part != "all":
        return
    provenance = {**metrics["provenance"], "device": device_name(cli.model.device)}
    (HERE / "mnist_bits.json").write_text(json.dumps({"provenance": provenance, "rows": results}, indent=1) + "\n")
    (HERE / "mnist_bits.md").write_text(markdown(results, args, provenance))


def markdown(results: list[dict[str, Any]], args: argparse.Namespace, provenance: dict[str, Any]) -> str:
    """The tables."""
    cells = {(r["arm"], r["bits"], r["symmetry"]): [] for r in results}
    for row in results:
        cells[row["arm"], row["bits"], row["symmetry"]].append(row)
    teacher = [r["teacher_fid"] for r in results if r["arm"] == "ptq" and r["bits"] == 8 and r["symmetry"] == "preset"]
    seeds = " ".join(map(str, args.seeds))
    lines = [
        "# Bits against quality, packaged MNIST teacher",
        "",
        f"    python benchmarks/mnist_bits.py --seeds {seeds} --num_images {args.num_images}",
        "",
        f"W8, DDIM 50 steps, {args.num_images} images, seeds {seeds}: mean ± half the spread over the seeds. Machine: "
        f"{provenance['device']}, {provenance['threads']} thread(s), torch {provenance['torch']}. Every single run and "
        "its command stand in `mnist_bits.json`.",
        "",
        "Fréchet distances are on the 32 features of `mnist-classifier-32`: they are not FID, and compare with each "
        f"other only. The full-precision teacher is {mean(teacher)} from the real images.",
    ]
    titles = {
        "psnr_db": "PSNR to the teacher's images, dB (higher is better)",
        "fid_to_teacher": "Fréchet distance to the teacher's images (lower is better)",
        "fid": "Fréchet distance to real images",
        "relative_l2": "Relative L2 error",
    }
    for key, title in titles.items():
        lines += ["", f"## {title}", "", "| activations | " + " | ".join(ARMS) + " |", "|---|" + "---|" * len(ARMS)]
        for bits in BITS:
            values = [mean([r[key] for r in cells[arm, bits, "preset"]]) for arm in ARMS]
            lines.append(f"| A{bits} | " + " | ".join(values) + " |")
    lines += ["", "## Symmetry: PSNR, dB", "", "The presets are asymmetric, but for modiff at A6 and A8.", ""]
    lines += [
        "| activations | ptq, asymmetric | ptq, symmetric | modiff, asymmetric | modiff, symmetric |",
        "|---|---|---|---|---|",
    ]
    for bits in BITS:
        symmetric_preset = {"ptq": False, "modiff": bits >= 6}
        values = []
        for arm in ("ptq", "modiff"):
            for symmetric in (False, True):
                which = "preset" if symmetric == symmetric_preset[arm] else OTHER_SYMMETRY
                values.append(mean([r["psnr_db"] for r in cells[arm, bits, which]]))
        lines.append(f"| A{bits} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def mean(values: list[float]) -> str:
    """Mean and half the spread."""
    digits = 2 if statistics.fmean(values) >= 1 else 4
    return f"{statistics.fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    main()
