r"""Bits against quality on a packaged teacher, three seeds: writes bits.md and bits.json beside itself.

python benchmarks/bits.py [--teacher mnist] [--weights 8 4] [--bits 8 6 4 3 2] [--arms ptq ...] [--seeds 0 1 2] \
    [--num_images 64] [--steps 50] [--features NETWORK --reference STATISTICS] [--output runs/bits]

Every row is kept on disk as soon as it is measured: interrupted, the same command goes on where it stopped, and rows
that no command asked for stand as not measured. Features and reference (of `modiff statistics`) are the teacher's own
where it has some. Seeds of 100 and above were used to choose the presets; those in the table were not.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.metrics.features import count_features, load_feature_network
from modiff.metrics.fidelity import ImageFidelity
from modiff.metrics.pairwise import mean_psnr_db, relative_l2
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import Teacher, TeacherSpec, load_teacher

HERE = Path(__file__).parent
BATCH = 32
CALIBRATION_SEED, CALIBRATION_IMAGES = 1000, 16
"""Of the noise of the images that students are calibrated on; seed s of a row calibrates on noise 1000 + s."""


@dataclass(frozen=True)
class Arm:
    """A column of the tables.

    Args:
        kind: Ending of the preset: ``modiff``, ``ptq``, ``modiff-paper`` or ``ptq-paper``.
        method: How weights are rounded; a method that uses data is calibrated anew for every seed.
        settings: Fields of CalibrationSettings that differ from the defaults.
        activation: Fields of the activation spec that differ from the preset's.
        modulation: Fields of the modulation that differ.
        weights: Weight bits for which it is measured.
    """

    kind: str
    method: str = "nearest"
    settings: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    modulation: dict[str, Any] = field(default_factory=dict)
    weights: tuple[int, ...] = (8, 4)

    def config(self, weight: int, activation: int) -> modiff.QuantConfig:
        """The whole quantization."""
        config = modiff.QuantConfig.preset(f"w{weight}a{activation}-{self.kind}")
        for side in ("activation", "modulation"):
            changes = getattr(self, side)
            if changes:
                part = dataclasses.replace(getattr(config, side), **changes)
                config = dataclasses.replace(config, **{side: part})
        return config


STATIC = {"granularity": "tensor", "range": "calibrated"}
ARMS = {
    "ptq, paper": Arm("ptq-paper"),
    "ptq": Arm("ptq"),
    "qdiffusion": Arm("ptq-paper", "brecq", {"ranges": "lp"}, activation=STATIC),
    "no compensation": Arm("modiff-paper", modulation={"error_compensation": False}),
    "modiff, paper": Arm("modiff-paper"),
    "modiff": Arm("modiff"),
    "modiff, gptq": Arm("modiff", "gptq", weights=(4,)),
    "modiff, adaround": Arm("modiff", "adaround", weights=(4,)),
    "modiff, brecq": Arm("modiff", "brecq", weights=(4,)),
}
KEYS = {
    "psnr_db": "PSNR to the teacher's images, dB",
    "relative_l2": "Relative L2 to the teacher's images",
    "fid_to_teacher": "Fréchet distance to the teacher's images",
    "fid": "Fréchet distance to real images",
    "gbops": "GBOPs per evaluation, at the bits of the codes",
    "container_gbops": "GBOPs per evaluation, at the bits of containers",
}


class Bench:
    """A teacher, its images, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.output / args.teacher
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = TeacherSpec(args.teacher)
        self.teacher: Teacher = load_teacher(spec)
        self.scheduler = make_scheduler(spec.entry.scheduler, self.teacher.scheduler_config)
        features = args.features or spec.entry.features
        reference = args.reference or spec.entry.statistics
        self.network = None if features is None else load_feature_network(features)
        self.reference = None if reference is None else FeatureStatistics.load(reference)

    def draw(self, denoiser: nn.Module, seed: int, count: int) -> Tensor:
        """Images in [-1, 1], in batches of :data:`BATCH`; each batch of a student is one trajectory."""
        parts = []
        for first in range(0, count, BATCH):
            noise = indexed_noise(seed, range(first, min(first + BATCH, count)), self.teacher.sample_shape)
            if denoiser is self.teacher.denoiser:
                parts.append(sample(denoiser, self.scheduler, noise, self.args.steps))
                continue
            with modiff.trajectory(denoiser):
                parts.append(sample(denoiser, self.scheduler, noise, self.args.steps))
        return torch.cat(parts).float()

    def teacher_images(self, seed: int) -> Tensor:
        """Kept on disk."""
        path = self.folder / f"teacher.{seed}.{self.args.num_images}.{self.args.steps}.pt"
        if not path.exists():
            torch.save(self.draw(self.teacher.denoiser, seed, self.args.num_images), path)
        images: Tensor = torch.load(path)
        return images

    def student(self, config: modiff.QuantConfig, arm: Arm, seed: int) -> nn.Module:
        """Quantized, and calibrated where the arm uses data."""
        model = copy.deepcopy(self.teacher.denoiser)
        if arm.method == "nearest" and not arm.activation.get("range"):
            return modiff.quantize(model, config)

        def run(student: nn.Module) -> None:
            self.draw(student, CALIBRATION_SEED + seed, CALIBRATION_IMAGES)

        return calibrate(model, config, run, arm.method, seed, settings=CalibrationSettings(**arm.settings))

    def measure(self, weight: int, bits: int, name: str, seed: int) -> None:
        """One row, unless it lies on disk."""
        path = self.path(weight, bits, name, seed)
        if path.exists():
            return
        arm = ARMS[name]
        student = self.student(arm.config(weight, bits), arm, seed)
        images, teacher = self.draw(student, seed, self.args.num_images), self.teacher_images(seed)
        row = {
            "weights": weight,
            "bits": bits,
            "arm": name,
            "seed": seed,
            "relative_l2": relative_l2(images, teacher).mean().item(),
            "psnr_db": mean_psnr_db(unit(images), unit(teacher)),
            **self.distances(unit(images), unit(teacher)),
        }
        one = torch.zeros(1, *self.teacher.sample_shape)
        cost = modiff.cost(student, one, torch.tensor(1), evaluations=self.args.steps)
        row["gbops"] = cost.gbops_per_evaluation
        row["container_gbops"] = getattr(cost, "container_gbops_per_evaluation", None)
        path.write_text(json.dumps(row))
        print(row, flush=True)

    def path(self, weight: int, bits: int, name: str, seed: int) -> Path:
        """Where a row is kept."""
        protocol = f"{self.args.num_images}.{self.args.steps}"
        return self.folder / f"w{weight}a{bits}.{name.replace(', ', '-').replace(' ', '_')}.{seed}.{protocol}.json"

    @torch.no_grad()
    def distances(self, images: Tensor, teacher: Tensor) -> dict[str, Any]:
        """Fréchet distances, null where there is no feature network or there are too few images."""
        if self.network is None:
            return {"fid": None, "fid_to_teacher": None, "teacher_fid": None}
        count = count_features(self.network, torch.zeros(2, *images.shape[1:]))
        fidelity = ImageFidelity(self.network, self.reference, count)
        fidelity.update(teacher, "teacher")
        fidelity.update(images, "student")
        found = fidelity.compute()
        student = found["student"]
        return {
            "fid": student["fid"],
            "fid_to_teacher": student["fid_to_teacher"],
            "teacher_fid": found["teacher"]["fid"],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Everything that was measured with this number of images and steps."""
        return [
            json.loads(path.read_text())
            for path in sorted(self.folder.glob(f"*.{self.args.num_images}.{self.args.steps}.json"))
        ]


def unit(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clamped."""
    return (images / 2 + 0.5).clamp(0, 1)


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mnist", help="a name of the zoo")
    parser.add_argument("--weights", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 6, 8], help="of activations, in this order")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--features", default=None, help="feature network; default: the teacher's own, if any")
    parser.add_argument("--reference", default=None, help="its statistics of real images")
    parser.add_argument("--output", type=Path, default=Path("runs/bits"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args)
    for weight in args.weights:
        for bits in args.bits:
            for name in args.arms:
                for seed in args.seeds:
                    if weight in ARMS[name].weights:
                        bench.measure(weight, bits, name, seed)
    write(bench)


def write(bench: Bench) -> None:
    """The rows of this teacher into bits.json, and the tables of all teachers into bits.md."""
    file = HERE / "bits.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    args = bench.args
    network = None if bench.network is None else Path(str(args.features or "the teacher's own")).stem
    known[args.teacher] = {
        "num_images": args.num_images,
        "steps": args.steps,
        "sampler": type(bench.scheduler).__name__,
        "features": network,
        "torch": torch.__version__,
        "rows": bench.rows(),
    }
    file.write_text(json.dumps(known, indent=1) + "\n")
    notes = HERE / "bits_notes.md"
    text = "\n".join(markdown(known)) + "\n"
    (HERE / "bits.md").write_text(text + (notes.read_text() if notes.exists() else ""))


def markdown(known: dict[str, Any]) -> list[str]:
    """The tables."""
    lines = [
        "# Bits against quality",
        "",
        "    python benchmarks/bits.py --teacher TEACHER --num_images N --steps STEPS",
        "",
        "Mean ± half the spread over three seeds of the noise, which is the teacher's. A dash: not measured. The arms",
        "`ptq` and `modiff` are the presets of those names, `paper` the ones that keep the paper's protocol; methods",
        "after a comma round the weights on 16 images of other noise, drawn anew for each seed. Fréchet distances are",
        "of the network named below; they are not FID. Every row stands in `bits.json`.",
    ]
    for teacher, result in known.items():
        lines += ["", f"## {teacher}", ""]
        lines.append(
            f"{result['num_images']} images a seed, {result['steps']} steps of {result['sampler']}; features: "
            f"{result['features'] or 'none'}; torch {result['torch']}, CPU."
        )
        for key, title in KEYS.items():
            if any(row.get(key) is not None for row in result["rows"]):
                lines += ["", f"### {title}", "", *table(result["rows"], key)]
    return lines


def table(rows: list[dict[str, Any]], key: str) -> list[str]:
    """One figure: bits down, arms across."""
    arms = [name for name in ARMS if any(row["arm"] == name for row in rows)]
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for weight in (8, 4):
        for bits in (8, 6, 4, 3, 2):
            cells = []
            for name in arms:
                found = [r for r in rows if (r["weights"], r["bits"], r["arm"]) == (weight, bits, name)]
                cells.append(cell([row[key] for row in found if row.get(key) is not None]))
            if any(text != "-" for text in cells):
                lines.append(f"| W{weight}A{bits} | " + " | ".join(cells) + " |")
    return lines


def cell(values: list[float]) -> str:
    """Mean and half the spread, with the number of seeds where these are not three."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    digits = 1 if mean >= 10 else 3
    text = f"{mean:.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"
    return text if len(values) == 3 else f"{text} ({len(values)})"


if __name__ == "__main__":
    main()
