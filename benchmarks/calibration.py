"""Calibrated weights on the packaged teacher, three seeds: writes calibration.md and calibration.json beside itself.

python benchmarks/calibration.py [--seeds 0 1 2] [--num_images 64] [--output runs/calibration] [--rows w4a4-gptq ...]

Interrupted, it goes on where it stopped. Calibrations draw their noise from seeds that no evaluation uses.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.lit.callbacks.provenance import device_name, git_commit, package_versions
from modiff.lit.modules.student import to_unit_range
from modiff.metrics.pairwise import mean_psnr_db, relative_l2
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import Teacher, TeacherSpec, load_teacher

HERE = Path(__file__).parent
STEPS = 50
CALIBRATION_SEED, CALIBRATION_IMAGES = 1000, 16
"""Of the noise of the images that students are calibrated on, once for each row."""
METHODS = ("nearest", "lp", "gptq", "adaround", "brecq")
LEARNED = ("gptq", "adaround", "brecq")


@dataclass(frozen=True)
class Row:
    """One student.

    Args:
        preset: Its quantization.
        method: How its weights are rounded.
        tag: Ending of its name, where others have the same preset and method.
        settings: Fields of CalibrationSettings that differ from the defaults.
        activation: Fields of the activation spec that differ from the preset's.
        calibration_seed: Of the noise of the images that it is calibrated on.
    """

    preset: str
    method: str = "nearest"
    tag: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    calibration_seed: int = CALIBRATION_SEED

    @property
    def name(self) -> str:
        """Such as ``w4a4-gptq``."""
        return "-".join(filter(None, (self.preset.partition("-")[0], self.method, self.tag)))

    @property
    def uses_data(self) -> bool:
        """Whether it is calibrated on trajectories."""
        return self.method in LEARNED or self.activation.get("range") == "calibrated"

    def config(self) -> modiff.QuantConfig:
        """The whole quantization."""
        config = modiff.QuantConfig.preset(self.preset)
        if self.activation:
            assert config.activation is not None
            config = dataclasses.replace(config, activation=dataclasses.replace(config.activation, **self.activation))
        return config


UNTUNED = {"tuning_iterations": 0}
STATIC = {"range": "calibrated", "granularity": "tensor"}
ROWS = (
    Row("w4a4-modiff-paper"),
    Row("w8a4-modiff-paper"),
    Row("w4a4-modiff-paper", "gptq"),
    Row("w4a4-modiff-paper", "gptq", "untuned", UNTUNED),
    Row("w4a4-modiff-paper", "lp"),
    Row("w4a32-ptq-paper"),
    Row("w4a32-ptq-paper", "lp"),
    Row("w4a32-ptq-paper", "gptq"),
    Row("w4a3-modiff-paper"),
    Row("w8a3-modiff-paper"),
    Row("w4a3-modiff-paper", "gptq"),
    Row("w4a3-modiff-paper", "lp"),
    Row("w4a4-modiff-paper", "brecq"),
    Row("w4a4-modiff-paper", "adaround"),
    Row("w4a32-ptq-paper", "brecq"),
    Row("w4a3-modiff-paper", "brecq"),
    Row("w4a32-ptq-paper", "adaround"),
    Row("w4a3-modiff-paper", "adaround"),
    Row("w8a4-modiff-paper", "nearest", "tensor", activation={"granularity": "tensor"}),
    Row("w8a4-modiff-paper", "nearest", "static", activation={**STATIC, "timestep_buckets": 1}),
    Row("w8a4-modiff-paper", "nearest", "static-buckets", activation={**STATIC, "timestep_buckets": 10}),
)
PAIRS = (("w4a4", "w8a4"), ("w4a3", "w8a3"))
STATIC_TABLE = (
    ("dynamic, per sample", "w8a4-nearest"),
    ("dynamic, per layer", "w8a4-nearest-tensor"),
    ("static, per layer", "w8a4-nearest-static"),
    ("static, per layer and time-step bucket (10)", "w8a4-nearest-static-buckets"),
)


class Bench:
    """The teacher, its images, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.output
        self.count: int = args.num_images
        self.teacher: Teacher = load_teacher(TeacherSpec("mnist"))
        self.scheduler = make_scheduler("ddim", self.teacher.scheduler_config)
        self.folder.mkdir(parents=True, exist_ok=True)

    def draw(self, denoiser: nn.Module, seed: int, count: int) -> Tensor:
        """Images in [-1, 1]."""
        noise = indexed_noise(seed, list(range(count)), self.teacher.sample_shape)
        return sample(denoiser, self.scheduler, noise, STEPS).float()

    def teacher_images(self, seed: int) -> Tensor:
        """Kept on disk."""
        path = self.folder / f"teacher-{seed}-{self.count}.pt"
        if not path.exists():
            torch.save(self.draw(self.teacher.denoiser, seed, self.count), path)
        images: Tensor = torch.load(path)
        return images

    def student(self, row: Row) -> tuple[nn.Module, float]:
        """The calibrated student, and processor seconds of its calibration."""
        path = self.folder / row.name
        model = copy.deepcopy(self.teacher.denoiser)
        if path.exists():
            return modiff.load(path, model), json.loads(path.with_suffix(".seconds").read_text())

        def run(student: nn.Module) -> None:
            with modiff.trajectory(student):
                self.draw(student, row.calibration_seed, CALIBRATION_IMAGES)

        start = time.process_time()
        settings = CalibrationSettings(**row.settings)
        student = calibrate(model, row.config(), run, row.method, settings=settings)
        seconds = time.process_time() - start
        path.with_suffix(".seconds").write_text(json.dumps(seconds))
        modiff.save(student, path)
        return student, seconds

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """One student's images against its teacher's; kept on disk."""
        path = self.folder / f"{row.name}.{seed}.{self.count}.json"
        if not path.exists():
            student, seconds = self.student(row)
            with modiff.trajectory(student):
                images = self.draw(student, seed, self.count)
            teacher = self.teacher_images(seed)
            result = {
                "row": row.name,
                "seed": seed,
                "calibration_noise": row.calibration_seed if row.uses_data else None,
                "relative_l2": relative_l2(images, teacher).mean().item(),
                "psnr_db": mean_psnr_db(to_unit_range(images), to_unit_range(teacher)),
                "calibration_cpu_seconds": seconds if row.uses_data else None,
            }
            path.write_text(json.dumps(result))
            print(result, flush=True)
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--rows", nargs="*", default=None, help="names of rows to measure; the rest as it is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args)
    for row in ROWS:
        if args.rows is None or row.name in args.rows:
            for seed in args.seeds:
                bench.measure(row, seed)
    results = []
    for row in ROWS:
        for seed in args.seeds:
            path = args.output / f"{row.name}.{seed}.{args.num_images}.json"
            results += [json.loads(path.read_text())] if path.exists() else []
    write(results, args)


def write(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Both files."""
    provenance = {
        "git_commit": git_commit(),
        **package_versions("modiff", "torch", "diffusers"),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "seeds": args.seeds,
        "num_images": args.num_images,
        "calibration_images": CALIBRATION_IMAGES,
    }
    (HERE / "calibration.json").write_text(json.dumps({"provenance": provenance, "rows": results}, indent=1) + "\n")
    (HERE / "calibration.md").write_text(markdown(results, provenance))


class Tables:
    """Cells of the tables, from single runs."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        self.cells: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            self.cells.setdefault(result["row"], []).append(result)

    def text(self, name: str, key: str, digits: int = 3) -> str:
        """Mean ± half the spread of one row."""
        values = [result[key] for result in self.cells.get(name, [])]
        if not values:
            return "not measured"
        return f"{statistics.fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"

    def share(self, name: str, low: str, high: str) -> str:
        """Of the gap between two rows, what another closes."""
        if not {name, low, high} <= self.cells.keys():
            return "not measured"
        a, b, c = (statistics.fmean(r["relative_l2"] for r in self.cells[key]) for key in (low, name, high))
        return f"{(a - b) / (a - c):.2f}"

    def methods(self, key: str, digits: int) -> list[str]:
        """A table of one figure: methods by bit widths."""
        lines = ["| weights | W4A32 | W4A4 | W4A3 |", "|---|---|---|---|"]
        for method in METHODS:
            values = [self.text(f"{bits}-{method}", key, digits) for bits in ("w4a32", "w4a4", "w4a3")]
            lines.append(f"| {method} | " + " | ".join(values) + " |")
        lines.append(f"| gptq, untuned | | {self.text('w4a4-gptq-untuned', key, digits)} | |")
        ceilings = [self.text(f"{bits}-nearest", key, digits) for bits in ("w8a4", "w8a3")]
        return [*lines, "| ceiling: 8-bit weights | | " + " | ".join(ceilings) + " |"]

    def shares(self) -> list[str]:
        """What methods close of the gap to 8-bit weights."""
        lines = ["| weights | W4A4 | W4A3 |", "|---|---|---|"]
        for method in ("lp", "gptq-untuned", "gptq", "adaround", "brecq"):
            found = [self.share(f"{w}-{method}", f"{w}-nearest", f"{c}-nearest") for w, c in PAIRS]
            lines.append(f"| {method.replace('-', ', ')} | " + " | ".join(found) + " |")
        return lines

    def static(self) -> list[str]:
        """Static and dynamic scales."""
        rows = [
            f"| {title} | {self.text(name, 'relative_l2')} | {self.text(name, 'psnr_db', 1)} |"
            for title, name in STATIC_TABLE
        ]
        return ["| scales | relative L2 | PSNR, dB |", "|---|---|---|", *rows]

    def seconds(self) -> list[str]:
        """Time of the calibrations."""
        lines = ["| weights | W4A32 | W4A4 | W4A3 |", "|---|---|---|---|"]
        for method in LEARNED:
            values = [self.text(f"{b}-{method}", "calibration_cpu_seconds", 0) for b in ("w4a32", "w4a4", "w4a3")]
            lines.append(f"| {method} | " + " | ".join(values) + " |")
        return lines


def wall_times() -> list[str]:
    """The figures of calibration_time.py, if it ran."""
    path = HERE / "calibration_time.json"
    if not path.exists():
        return ["Wall times: not measured (`python benchmarks/calibration_time.py`)."]
    found = json.loads(path.read_text())
    lines = [
        f"Wall time and memory beyond the teacher's, by `{found['provenance']['command']}` (a process for each; "
        f"{found['provenance']['device']}, W4A4 modulated, default settings):",
        "",
        "| teacher | method | images, DDIM steps | threads | seconds | extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        teacher = f"{row['name'].rpartition('-')[0]} ({row['parameters'] / 1e6:.1f}M)"
        cells = (teacher, row["method"], f"{row['images']}, {row['steps']}", row["threads"])
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['seconds']:.0f} | {row['extra_mib']:.0f} |")
    return lines


def markdown(results: list[dict[str, Any]], provenance: dict[str, Any]) -> str:
    """The tables, and the notes of calibration_notes.md below them."""
    tables, seeds, images = Tables(results), " ".join(map(str, provenance["seeds"])), provenance["num_images"]
    lines = [
        "# Calibrated weights, packaged MNIST teacher",
        "",
        f"    python benchmarks/calibration.py --seeds {seeds} --num_images {images}",
        "",
        f"DDIM {STEPS} steps, {images} images; mean ± half the spread over seeds {seeds}. Calibrated once, on "
        f"{CALIBRATION_IMAGES} images of other noise (seed {CALIBRATION_SEED}), default settings. Machine: "
        f"{provenance['device']}, {provenance['threads']} thread, torch {provenance['torch']}. Every single run stands "
        "in `calibration.json`.",
        "",
        "All rows of data methods (GPTQ, AdaRound, BRECQ) have their scales and biases tuned on the denoiser's output, "
        "but for those that say untuned. W4A4 and W4A3 are modulated. Presets are the paper's (`-paper`); with the "
        "best known ones see `bits.md`.",
        "",
        "## Relative L2 error to the teacher's images (lower is better)",
        "",
        *tables.methods("relative_l2", 3),
        "",
        "Share of the gap between 4-bit weights rounded to nearest and 8-bit weights that a method closes, "
        "`(L2[nearest] - L2[method]) / (L2[nearest] - L2[W8])`:",
        "",
        *tables.shares(),
        "",
        "## PSNR to the teacher's images, dB",
        "",
        *tables.methods("psnr_db", 1),
        "",
        "## Static residual scales against dynamic ones",
        "",
        "W8A4, modulated, weights rounded to nearest.",
        "",
        *tables.static(),
        "",
        "## Time of a calibration",
        "",
        "Processor seconds (of all threads; here one), so that other work on the machine does not count.",
        "",
        *tables.seconds(),
        "",
        *wall_times(),
    ]
    notes = HERE / "calibration_notes.md"
    return "\n".join(lines) + "\n" + ("\n" + notes.read_text() if notes.exists() else "")


if __name__ == "__main__":
    main()
