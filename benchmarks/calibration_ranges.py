"""Calibrated against dynamic ranges on the packaged teacher: writes calibration_ranges.md and .json beside itself.

python benchmarks/calibration_ranges.py [--seeds 0 1 2] [--num_images 64] [--output runs/calibration_ranges]

Interrupted, it goes on where it stopped. ``--report`` writes the tables of the rows that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.lit.callbacks.provenance import device_name
from modiff.metrics.pairwise import mean_psnr_db, relative_l2
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

HERE = Path(__file__).parent
STEPS = 50
CALIBRATION_STREAM = 2**40  # far from the noise of the images that are compared
BITS = (4, 3, 8)


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm: bits of activations, observer (or ``dynamic``), buckets or granularity."""

    bits: int
    ranges: str
    buckets: int = 1
    granularity: str = "tensor"
    passes: int = 2
    modulated: bool = True

    @property
    def name(self) -> str:
        """Of its files."""
        kind = "modiff" if self.modulated else "ptq"
        return f"{kind}_a{self.bits}_{self.ranges}_{self.granularity}_k{self.buckets}_p{self.passes}"


def rows() -> list[Row]:
    """In the order in which they matter."""
    found = [Row(4, "dynamic", granularity="sample"), Row(4, "minmax", 10), Row(4, "minmax", 1), Row(4, "lp", 10)]
    found += [Row(3, "dynamic", granularity="sample"), Row(3, "minmax", 10), Row(4, "lsq", 10), Row(3, "lp", 10)]
    found += [Row(4, "percentile", 10), Row(4, "minmax", 50), Row(8, "dynamic", granularity="sample")]
    found += [Row(8, "minmax", 10), Row(3, "minmax", 1), Row(3, "lsq", 10), Row(3, "percentile", 10)]
    found += [Row(3, "minmax", 50), Row(8, "minmax", 1), Row(8, "minmax", 50), Row(8, "lp", 10)]
    found += [Row(bits, "dynamic") for bits in BITS]
    found += [Row(8, "dynamic", modulated=False), Row(8, "minmax", modulated=False)]
    found += [Row(4, "minmax", 10, passes=1), Row(4, "minmax", 10, "channel")]
    found += [Row(bits, kind, k) for kind in ("lp", "percentile", "lsq") for k in (1, 50) for bits in (4, 3)]
    found += [Row(bits, "moving_average", 10) for bits in (4, 3)]
    found += [Row(8, "minmax", 10, modulated=False)]
    return found


def config(row: Row) -> modiff.QuantConfig:
    """The preset's, but for its ranges."""
    base = modiff.QuantConfig.preset(f"w8a{row.bits}-{'modiff' if row.modulated else 'ptq'}-paper")
    assert base.activation is not None
    kind = "dynamic" if row.ranges == "dynamic" else "calibrated"
    spec = dataclasses.replace(base.activation, granularity=row.granularity, range=kind, timestep_buckets=row.buckets)
    return dataclasses.replace(base, activation=spec, backend="simulate")


class Bench:
    """The teacher, and its images from the noise of each seed."""

    def __init__(self, num_images: int, batch: int, calibration_images: int) -> None:
        self.num_images, self.batch, self.calibration_images = num_images, batch, calibration_images
        self.teachers: dict[int, torch.Tensor] = {}

    def draw(self, denoiser: Any, teacher: Any, seed: int, count: int, stream: int = 0) -> torch.Tensor:
        """Images ``[count, C, H, W]`` in the model's own range."""
        scheduler = make_scheduler("ddim", teacher.scheduler_config)
        images = []
        for indices in torch.arange(count).split(self.batch):
            noise = indexed_noise(seed, indices.tolist(), teacher.sample_shape, stream)
            if hasattr(denoiser, "_modiff_state"):
                with modiff.trajectory(denoiser):
                    images.append(sample(denoiser, scheduler, noise, STEPS))
            else:
                images.append(sample(denoiser, scheduler, noise, STEPS))
        return torch.cat(images)

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Calibrate and compare."""
        teacher = load_teacher(TeacherSpec(name="mnist"))
        if seed not in self.teachers:
            self.teachers[seed] = self.draw(teacher.denoiser, teacher, seed, self.num_images)
        start = time.monotonic()
        settings = CalibrationSettings(range_passes=row.passes)
        if row.ranges != "dynamic":
            settings = dataclasses.replace(settings, ranges=row.ranges)
        student = calibrate(
            teacher.denoiser,
            config(row),
            lambda s: self.draw(s, teacher, seed, self.calibration_images, CALIBRATION_STREAM),
            "nearest",
            seed,
            settings=settings,
        )
        seconds = time.monotonic() - start
        images = self.draw(student, teacher, seed, self.num_images)
        wanted = self.teachers[seed]
        unit = [((x + 1) / 2).clamp(0, 1) for x in (images, wanted)]
        return {
            **dataclasses.asdict(row),
            "seed": seed,
            "psnr_db": mean_psnr_db(*unit),
            "relative_l2": float(relative_l2(images, wanted).mean()),
            "calibration_seconds": seconds if row.ranges != "dynamic" else 0.0,
        }


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--calibration_images", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration_ranges"))
    parser.add_argument("--report", action="store_true", help="only write the tables of the rows that are there")
    args = parser.parse_args()
    bench = Bench(args.num_images, args.batch, args.calibration_images)
    found = []
    for row in rows():
        for seed in args.seeds:
            path = args.output / f"{row.name}_seed{seed}.json"
            if not path.exists() and not args.report:
                path.parent.mkdir(parents=True, exist_ok=True)
                measured = bench.measure(row, seed)
                path.with_suffix(".part").write_text(json.dumps(measured))
                path.with_suffix(".part").replace(path)
                print(row.name, seed, measured["psnr_db"], measured["calibration_seconds"], flush=True)
            if path.exists():
                found.append(json.loads(path.read_text()))
    whole = [row for row in found if sum(_same(row, other) for other in found) == len(args.seeds)]
    provenance = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    provenance |= {"torch": torch.__version__, "command": command(args)}
    (HERE / "calibration_ranges.json").write_text(
        json.dumps({"provenance": provenance, "rows": whole}, indent=1) + "\n"
    )
    (HERE / "calibration_ranges.md").write_text(markdown(whole, args, provenance))


def command(args: argparse.Namespace) -> str:
    """What was typed."""
    seeds = " ".join(map(str, args.seeds))
    sizes = f"--num_images {args.num_images} --batch {args.batch} --calibration_images {args.calibration_images}"
    return f"python benchmarks/calibration_ranges.py --seeds {seeds} {sizes}"


def markdown(found: list[dict[str, Any]], args: argparse.Namespace, provenance: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Calibrated against dynamic ranges, packaged MNIST teacher",
        "",
        f"    {provenance['command']}",
        "",
        f"W8 nearest, DDIM {STEPS} steps, {args.num_images} images in batches of {args.batch}, calibrated on "
        f"{args.calibration_images} others; seeds {' '.join(map(str, args.seeds))}: mean ± half the spread. "
        f"Machine: {provenance['device']}, {provenance['threads']} thread(s), torch {provenance['torch']}. PSNR and "
        "relative L2 are to the teacher's images of the same noise. Symmetry as in the presets. Rows of which not all "
        f"seeds were measured are left out: {len(rows()) - len(found) // len(args.seeds)} of {len(rows())}. "
        "Everything is simulated in float32.",
        "",
        "| activations | ranges | granularity | buckets | PSNR, dB | relative L2 |",
        "|---|---|---|---|---|---|",
    ]
    done = []
    for row in sorted(found, key=lambda r: (not r["modulated"], -r["bits"])):
        if any(_same(row, other) for other in done):
            continue
        done.append(row)
        group = [other for other in found if _same(row, other)]
        kind = f"A{row['bits']}" + ("" if row["modulated"] else ", plain")
        ranges = row["ranges"] + (", one pass" if row["passes"] == 1 else "")
        buckets = "" if row["ranges"] == "dynamic" else row["buckets"]
        values = [mean([r[key] for r in group]) for key in ("psnr_db", "relative_l2")]
        lines.append(f"| {kind} | {ranges} | {row['granularity']} | {buckets} | {values[0]} | {values[1]} |")
    return "\n".join(lines) + "\n"


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[field.name] == b[field.name] for field in dataclasses.fields(Row))


def mean(values: list[float]) -> str:
    """Mean and half the spread."""
    digits = 2 if statistics.fmean(values) >= 1 else 4
    return f"{statistics.fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    main()
