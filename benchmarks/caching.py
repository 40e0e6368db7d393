"""Skipping and quantizing together: quality, bit operations and time of every combination, and of fewer steps.

python benchmarks/caching.py --seeds 0 1 2 --num_images 16

Rows that the JSON file already holds are not measured again. PSNR is to the teacher's images of the same noise and the
same sampler (DDIM, 50 steps, unless a row says otherwise: then to the same 50-step images).
"""

from __future__ import annotations

import argparse
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
from modiff.metrics.pairwise import mean_psnr_db
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
    "W8A8 ptq-paper": "w8a8-ptq-paper",
    "W8A8 modiff-paper": "w8a8-modiff-paper",
    "W8A4 modiff-paper": "w8a4-modiff-paper",
}
STATIC = ["none", "reuse-2", "reuse-3", "extrapolate-2", "extrapolate-3", "deep-reuse-2"]
SHARES = (0.3, 0.4)
CALIBRATION_SEED = 1000


class Drawer:
    """Draws trajectories of a teacher and its students."""

    def __init__(self, name: str, steps: int, batch: int) -> None:
        self.teacher = load_teacher(TeacherSpec(name=name))
        self.steps, self.batch = steps, batch

    def draw(self, model: nn.Module, seed: int, count: int, sampler: str = "ddim", steps: int | None = None) -> Tensor:
        """Images in the model's own range."""
        scheduler = make_scheduler(sampler, self.teacher.scheduler_config)
        parts = []
        for first in range(0, count, self.batch):
            noise = indexed_noise(seed, range(first, first + self.batch), self.teacher.sample_shape)
            bound = self.teacher.bind(model, {}, 1.0)
            if hasattr(model, "_modiff_state"):
                with modiff.trajectory(model):
                    parts.append(sample(bound, scheduler, noise, steps or self.steps))
            else:
                parts.append(sample(bound, scheduler, noise, steps or self.steps))
        return torch.cat(parts)

    def student(self, preset: str | None, schedule: ReuseSchedule | None) -> nn.Module:
        """A student of a fresh copy of the teacher."""
        config = QuantConfig() if preset is None else QuantConfig.preset(preset)
        model = copy.deepcopy(self.teacher.denoiser)
        if preset is None and schedule is None:
            return model
        return modiff.quantize(model, dataclasses.replace(config, schedule=schedule))

    def calibrated(self, preset: str | None, share: float) -> ReuseSchedule:
        """A schedule found on noise that no row is measured on."""
        config = QuantConfig() if preset is None else QuantConfig.preset(preset)
        return calibrate_schedule(
            self.teacher.denoiser, config, lambda model: self.draw(model, CALIBRATION_SEED, self.batch), share
        )


def unit(images: Tensor) -> Tensor:
    """Images in [0, 1]."""
    return ((images + 1) / 2).clamp(0, 1)


def measure(
    drawer: Drawer, arm: str, schedule_name: str, seeds: list[int], count: int, targets: dict[int, Tensor]
) -> Any:
    """One row: PSNR for each seed, bit operations of a trajectory, time against the teacher in turns."""
    preset = ARMS[arm]
    if schedule_name == "none":
        schedule = None
    elif schedule_name.startswith("calibrated"):
        schedule = drawer.calibrated(preset, float(schedule_name.split()[1]))
    else:
        schedule = ReuseSchedule.preset(schedule_name)
    model = drawer.student(preset, schedule)
    found = [mean_psnr_db(unit(drawer.draw(model, s, count)), unit(targets[s])) for s in seeds]
    x = indexed_noise(0, [0], drawer.teacher.sample_shape)
    counted = modiff.cost(model, x, torch.tensor(0), evaluations=drawer.steps)
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        drawer.draw(drawer.teacher.denoiser, 0, drawer.batch)
        middle = time.perf_counter()
        drawer.draw(model, 0, drawer.batch)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return {
        "psnr_db": found,
        "gbops": counted.gbops_per_evaluation * drawer.steps,
        "state_mib_per_image": counted.state_mib_per_image,
        "speed_over_eager_teacher": statistics.median(ratios),
    }


def solver(drawer: Drawer, arm: str, sampler: str, steps: int, seeds: list[int], count: int, targets: Any) -> Any:
    """Fewer steps instead of skipped blocks."""
    model = drawer.student(ARMS[arm], None)
    found = [mean_psnr_db(unit(drawer.draw(model, s, count, sampler, steps)), unit(targets[s])) for s in seeds]
    x = indexed_noise(0, [0], drawer.teacher.sample_shape)
    counted = modiff.cost(model, x, torch.tensor(0), evaluations=steps)
    return {"psnr_db": found, "gbops": counted.gbops_per_evaluation * steps}


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--output", type=Path, default=HERE / "caching.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    drawer = Drawer(args.teacher, args.steps, args.batch_size)
    rows = json.loads(args.output.read_text()) if args.output.exists() else {}
    targets = {s: drawer.draw(drawer.teacher.denoiser, s, args.num_images) for s in args.seeds}
    jobs = [(arm, name) for name in [*STATIC, *(f"calibrated {s}" for s in SHARES)] for arm in ARMS]
    for arm, name in jobs:
        key = f"{args.teacher} | {arm} | {name} | {args.steps} steps"
        if key not in rows:
            rows[key] = measure(drawer, arm, name, args.seeds, args.num_images, targets)
            save(rows, args.output)
            print(key, rows[key], flush=True)
    for sampler in ("ddim", "dpmpp_2m"):
        for steps in (10, 15, 20, 25, 33):
            for arm in ("full precision", "W8A8 modiff"):
                key = f"{args.teacher} | {arm} | {sampler} | {steps} steps"
                if key not in rows:
                    rows[key] = solver(drawer, arm, sampler, steps, args.seeds, args.num_images, targets)
                    save(rows, args.output)
                    print(key, rows[key], flush=True)


def save(rows: dict[str, Any], output: Path) -> None:
    """Write JSON and Markdown."""
    output.write_text(json.dumps(rows, indent=1) + "\n")
    head = (
        "| teacher | arm | schedule or sampler | PSNR, dB (mean, spread) | TBOPs per image | speed over eager teacher |"
    )
    lines = [head]
    lines.append("|---|---|---|---|---|---|")
    for key, row in rows.items():
        teacher, arm, name, steps = key.split(" | ")
        values = [v for v in row["psnr_db"] if v is not None]
        quality = f"{statistics.mean(values):.1f} ({max(values) - min(values):.1f})" if values else "identical"
        speed = row.get("speed_over_eager_teacher")
        lines.append(
            f"| {teacher} | {arm} | {name}, {steps} | {quality} | {row['gbops'] / 1000:.2f} | "
            f"{'' if speed is None else f'{speed:.2f}'} |"
        )
    output.with_suffix(".rows.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
