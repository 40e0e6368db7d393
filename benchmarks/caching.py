"""Skipping and quantizing together: quality, bit operations and time of every combination, and of fewer steps.

    python benchmarks/caching.py [--teacher mnist] [--seeds 0 1 2] [--num_images 32]
    python benchmarks/caching.py --time        # afterwards, on an idle machine: compiled, in turns with the teacher

Rows that the JSON file already holds are not measured again. No sampler clips x_0, so that the number of steps may grow
without end: the reference is the full-precision teacher with 200 steps of DPM-Solver++ from the same noise. Fréchet
distances are of the images of all seeds together, in the teacher's own features; their spread is that of leaving one
seed out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.calibration.schedules import calibrate_schedule
from modiff.config.quant import QuantConfig
from modiff.config.schedule import ReuseSchedule
from modiff.lit.search.target import unclipped
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.pairwise import mean_psnr_db
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

HERE = Path(__file__).parent
ARMS = {
    "full precision": None,
    "W8A8 ptq": "w8a8-ptq",
    "W8A8 modiff": "w8a8-modiff",
    "W8A4 modiff": "w8a4-modiff",
}
SCHEDULES = ["none", "reuse-2", "reuse-3", "extrapolate-2", "extrapolate-3", "calibrated 30 %", "calibrated 50 %"]
SCHEDULES += ["calibrated 70 %", "deep-reuse-2"]
SAMPLERS, STEPS, FEWER = ("ddim", "dpmpp_2m"), 50, (10, 15, 20, 25, 33, 40)
TIMED = ("none", "extrapolate-2", "extrapolate-3", "calibrated 50 %")
REFERENCE = ("dpmpp_2m", 200)
CALIBRATION_SEED = 1000
LONGEST = {30: 2, 50: 2, 70: 4}  # most evaluations in a row that a calibrated schedule skips, by its share in %


class Bench:
    """Draws trajectories of a teacher and its students, and keeps what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        spec = TeacherSpec(name=args.teacher)
        self.args, self.teacher = args, load_teacher(spec)
        features, statistics_of = args.features or spec.entry.features, args.reference or spec.entry.statistics
        self.network = None if features is None else load_feature_network(features)
        self.real = None if statistics_of is None else FeatureStatistics.load(statistics_of)
        self.rows: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
        self._drawn: dict[Any, Tensor] = {}

    def draw(self, model: nn.Module, seed: int, sampler: str, steps: int, count: int | None = None) -> Tensor:
        """Images in [-1, 1]; each batch is one trajectory."""
        scheduler = make_scheduler(sampler, self.teacher.scheduler_config, **unclipped(sampler))
        parts, batch = [], self.args.batch_size
        for first in range(0, self.args.num_images if count is None else count, batch):
            noise = indexed_noise(seed, range(first, first + batch), self.teacher.sample_shape)
            bound = self.teacher.bind(model, {}, 1.0)
            around = modiff.trajectory(model) if hasattr(model, "_modiff_state") else contextlib.nullcontext()
            with around:
                parts.append(sample(bound, scheduler, noise, steps))
        return torch.cat(parts).clamp(-1, 1)

    def full_precision(self, sampler: str, steps: int) -> Tensor:
        """The teacher's images of all seeds."""
        key = (sampler, steps)
        if key not in self._drawn:
            self._drawn[key] = self.all_seeds(self.teacher.denoiser, sampler, steps)
        return self._drawn[key]

    def all_seeds(self, model: nn.Module, sampler: str, steps: int) -> Tensor:
        """``[seeds, images, C, H, W]``."""
        return torch.stack([self.draw(model, seed, sampler, steps) for seed in self.args.seeds])

    def student(self, arm: str, name: str, sampler: str, steps: int) -> nn.Module:
        """A student of a fresh copy of the teacher, with its schedule."""
        config = QuantConfig() if ARMS[arm] is None else QuantConfig.preset(str(ARMS[arm]))
        model = copy.deepcopy(self.teacher.denoiser)
        if ARMS[arm] is None and name == "none":
            return model
        schedule = None if name == "none" else self.schedule(config, name, sampler, steps)
        return modiff.quantize(model, dataclasses.replace(config, schedule=schedule))

    def schedule(self, config: QuantConfig, name: str, sampler: str, steps: int) -> ReuseSchedule:
        """A preset, or one found on noise that no row is measured on."""
        if not name.startswith("calibrated"):
            return ReuseSchedule.preset(name)

        def run(model: nn.Module) -> None:
            self.draw(model, CALIBRATION_SEED, sampler, steps, self.args.batch_size)

        share = int(name.split()[1])
        return calibrate_schedule(self.teacher.denoiser, config, run, share / 100, longest=LONGEST[share])

    def measure(self, arm: str, name: str, sampler: str, steps: int) -> None:
        """One row, unless the file holds it."""
        key = self.key(arm, name, sampler, steps)
        if key in self.rows:
            return
        model = self.student(arm, name, sampler, steps)
        images = self.all_seeds(model, sampler, steps)
        x = indexed_noise(0, [0], self.teacher.sample_shape)
        counted = modiff.cost(model, x, torch.tensor(0), evaluations=steps)
        self.rows[key] = {
            "psnr_db_to_same_sampler": psnr(images, self.full_precision(sampler, steps)),
            "psnr_db_to_converged": psnr(images, self.full_precision(*REFERENCE)),
            **self.distances(images),
            "gbops": counted.gbops_per_evaluation * steps,
            "state_mib_per_image": counted.state_mib_per_image,
        }
        self.save()
        print(key, self.rows[key], flush=True)

    def key(self, arm: str, name: str, sampler: str, steps: int) -> str:
        """Of a row."""
        return f"{self.args.teacher} | {arm} | {name} | {sampler} {steps}"

    @torch.no_grad()
    def distances(self, images: Tensor) -> dict[str, Any]:
        """Fréchet distances to the converged images and to real ones; ranges from leaving one seed out."""
        if self.network is None:
            return {}
        target, found = self.full_precision(*REFERENCE), []
        everything = list(range(len(images)))
        for kept in [everything, *([i for i in everything if i != left] for left in everything if len(everything) > 1)]:
            count = count_features(self.network, torch.zeros(2, *images.shape[2:]))
            fidelity = ImageFidelity(self.network, self.real, count)
            fidelity.update(unit(target[kept].flatten(0, 1)), "teacher")
            fidelity.update(unit(images[kept].flatten(0, 1)), "student")
            found.append(fidelity.compute()["student"])
        return {key: [one[key] for one in found] for key in ("fid_to_teacher", "fid")}

    def time(self, arm: str, name: str, sampler: str) -> None:
        """Speed of a row's student over the teacher, both compiled, whole trajectories in turns."""
        row = self.rows.get(self.key(arm, name, sampler, STEPS))
        if row is None or "speed" in row:
            return
        model, teacher = self.student(arm, name, sampler, STEPS), copy.deepcopy(self.teacher.denoiser)
        teacher.compile()
        if hasattr(model, "_modiff_state"):
            modiff.compile(model)
        else:
            model.compile()
        batch, ratios = self.args.batch_size, []
        for round_ in range(1 + 5):
            start = time.perf_counter()
            self.draw(teacher, 0, sampler, STEPS, batch)
            middle = time.perf_counter()
            self.draw(model, 0, sampler, STEPS, batch)
            if round_:  # the first compiles
                ratios.append((middle - start) / (time.perf_counter() - middle))
        row["speed"] = ratios
        self.save()
        print(self.key(arm, name, sampler, STEPS), ratios, flush=True)

    def save(self) -> None:
        """Write JSON and Markdown."""
        self.args.output.write_text(json.dumps(self.rows, indent=1) + "\n")
        write_page(self.rows, self.args.output.with_suffix(".md"), HERE / "caching_notes.md")


def unit(images: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return ((images + 1) / 2).clamp(0, 1)


def psnr(images: Tensor, target: Tensor) -> list[float | None]:
    """Of each seed, dB; None where the images are identical."""
    return [mean_psnr_db(unit(a), unit(b)) for a, b in zip(images, target, strict=True)]


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mnist", help="A name of the zoo.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=32, help="Of each seed.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--time", action="store_true", help="Add the times of compiled students; nothing else.")
    parser.add_argument("--features", default=None, help="Feature network; default: the teacher's own, if any.")
    parser.add_argument("--reference", default=None, help="Its statistics of real images.")
    parser.add_argument("--output", type=Path, default=HERE / "caching.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args)
    for sampler in args.samplers:
        for arm in args.arms:
            for name in args.schedules:
                if not args.time:
                    bench.measure(arm, name, sampler, STEPS)
                elif name in TIMED and arm != "W8A8 ptq":
                    bench.time(arm, name, sampler)
            if not args.time:
                for steps in FEWER:
                    bench.measure(arm, "none", sampler, steps)


def write_page(rows: dict[str, Any], path: Path, notes: Path) -> None:
    """The table, and the notes beneath it."""
    lines = [
        "# Skipping and quantizing together",
        "",
        "    python benchmarks/caching.py --teacher TEACHER",
        "    python benchmarks/caching.py --teacher TEACHER --time",
        "",
        "32 images from each of the seeds 0, 1, 2; nothing is clipped. `same`: PSNR to the full-precision, unskipped",
        "images of the same sampler and steps; `converged`: to 200 steps of DPM-Solver++ in full precision; both in",
        "dB, mean and spread (largest less smallest) over seeds. `to converged`, `to real`: Fréchet distances in the",
        "teacher's own features, and the spread of leaving one seed out. `speed`: over the compiled full-precision",
        "teacher with 50 steps, both compiled, whole trajectories in turns, median of 5. Residual branches of all",
        "resnet and attention blocks are skipped; the rest of the network always runs.",
    ]
    head = "| arm | schedule | same | converged | to converged | to real | TBOPs per image | speed |"
    for group in dict.fromkeys((key.split(" | ")[0], key.split(" | ")[3].split()[0]) for key in rows):
        lines += ["", f"## {group[0]}, {group[1]}", "", head, "|---|---|---|---|---|---|---|---|"]
        for key, row in rows.items():
            teacher, arm, name, run = key.split(" | ")
            sampler, steps = run.split()
            if (teacher, sampler) != group:
                continue
            what = f"{steps} steps" if int(steps) != STEPS else name
            cells = [spread(row[k]) for k in ("psnr_db_to_same_sampler", "psnr_db_to_converged")]
            cells += [spread(row.get(k, []), 2) for k in ("fid_to_teacher", "fid")]
            speed = f"{statistics.median(row['speed']):.2f}" if "speed" in row else ""
            lines.append(f"| {arm} | {what} | {' | '.join(cells)} | {row['gbops'] / 1000:.3f} | {speed} |")
    text = "\n".join(lines) + "\n"
    path.write_text(text + (notes.read_text() if notes.exists() else ""))


def spread(values: list[float | None], digits: int = 1) -> str:
    """Mean of seeds and spread; of distances the first, which is of all seeds, and the spread."""
    known = [v for v in values if v is not None]
    if not known:
        return "identical" if values and digits == 1 else "-"
    first = known[0] if digits == 2 else statistics.mean(known)
    return f"{first:.{digits}f} ({max(known) - min(known):.{digits}f})"


if __name__ == "__main__":
    main()
