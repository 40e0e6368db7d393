"""Scales from the evaluation before (``range: previous``) against dynamic ones, packaged teacher.

    OMP_NUM_THREADS=1 python benchmarks/previous_range.py [--seeds 0 1 2] [--num_images 8]

It writes previous_range.md and previous_range.json beside itself, and takes a few minutes on one core. Each arm is the
paper's preset at 8-bit weights, with one scale per sample, all images in one batch.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modiff
from modiff.lit.callbacks.provenance import device_name
from modiff.metrics.pairwise import mean_psnr_db, relative_l2
from modiff.quantizers.affine import Limits
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

HERE = Path(__file__).parent
STEPS = 50
BITS = (8, 6, 4)
RANGES = ("dynamic", "previous")


@dataclass
class Tally:
    """Scales that were asked of the evaluation before.

    Args:
        asked: All of them: one for each sample, operator and evaluation that quantizes.
        first: Those for which there was no evaluation before.
        refused: Others, whose residual did not fit.
    """

    asked: int = 0
    first: int = 0
    refused: int = 0


@contextmanager
def counted() -> Iterator[Tally]:
    """Count which scales are not those of the evaluation before."""
    tally, original = Tally(), Limits.scale_after

    def scale_after(
        self: Limits, low: Tensor, high: Tensor, last: Tensor, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        before = last.clone()
        found = original(self, low, high, last, step)
        assert self.margin is not None
        widened = self.scale(before[0] * self.margin, before[1] * self.margin, step)[0]
        known = before[2] > 0
        tally.asked += known.numel()
        tally.first += int((~known).sum())
        tally.refused += int((known & (found[0] != widened)).sum())
        return found

    Limits.scale_after = scale_after  # type: ignore[method-assign]
    try:
        yield tally
    finally:
        Limits.scale_after = original  # type: ignore[method-assign]


@functools.cache
def teacher_images(seed: int, num_images: int) -> Tensor:
    """The teacher's images of a seed."""
    teacher = load_teacher(TeacherSpec(name="mnist"))
    noise = indexed_noise(seed, range(num_images), teacher.sample_shape)
    return sample(teacher.denoiser, make_scheduler("ddim", teacher.scheduler_config), noise, STEPS)


def measure(bits: int, kind: str, seed: int, num_images: int) -> dict[str, Any]:
    """One arm: its images against the teacher's from the same noise."""
    teacher = load_teacher(TeacherSpec(name="mnist"))
    scheduler = make_scheduler("ddim", teacher.scheduler_config)
    noise, wanted = indexed_noise(seed, range(num_images), teacher.sample_shape), teacher_images(seed, num_images)
    config = modiff.QuantConfig.preset(f"w8a{bits}-modiff-paper")
    assert config.activation is not None
    student = modiff.quantize(
        teacher.denoiser, replace(config, activation=replace(config.activation, granularity="sample", range=kind))
    )
    with counted() as tally, modiff.trajectory(student):
        images = sample(student, scheduler, noise, STEPS)
    unit = [((x + 1) / 2).clamp(0, 1) for x in (images, wanted)]
    row: dict[str, Any] = {"bits": bits, "range": kind, "seed": seed, "psnr_db": mean_psnr_db(*unit)}
    row["relative_l2"] = float(relative_l2(images, wanted).mean())
    return row | {"asked": tally.asked, "first": tally.first, "refused": tally.refused}


def share(rows: list[dict[str, Any]]) -> float:
    """Of the scales that had an evaluation before: those whose residual did not fit, in percent."""
    return 100 * sum(r["refused"] for r in rows) / sum(r["asked"] - r["first"] for r in rows)


def markdown(rows: list[dict[str, Any]], provenance: dict[str, Any]) -> str:
    """The table."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "# Scales from the evaluation before, packaged MNIST teacher",
        "",
        f"    {provenance['command']}",
        "",
        f"Presets `w8a{{bits}}-modiff-paper`, DDIM {STEPS} steps, {provenance['num_images']} images in one batch, "
        f"seeds {' '.join(map(str, seeds))}: mean ± half the spread, PSNR and relative L2 to the teacher's images of "
        f"the same noise. Machine: {provenance['device']}, {provenance['threads']} thread(s), torch "
        f"{provenance['torch']}. The last column is the "
        "share of scales (one for each sample, operator and evaluation) that the range of the "
        "evaluation before would have been too small for, so that they came from the residual itself; the first "
        "quantized evaluation, which has none before it, is not counted.",
        "",
        "| activations | range | PSNR, dB | relative L2 | fell back |",
        "|---|---|---|---|---|",
    ]
    for bits in BITS:
        for kind in RANGES:
            group = [row for row in rows if (row["bits"], row["range"]) == (bits, kind)]
            psnr, distance = (spread([row[key] for row in group]) for key in ("psnr_db", "relative_l2"))
            fell = f"{share(group):.0f} %" if kind == "previous" else ""
            lines.append(f"| A{bits} | {kind} | {psnr} | {distance} | {fell} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean and half the spread."""
    digits = 2 if statistics.fmean(values) >= 1 else 4
    return f"{statistics.fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def main() -> None:
    """Measure all arms, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for bits in BITS:
            for kind in RANGES:
                rows.append(measure(bits, kind, seed, args.num_images))
                print(rows[-1], flush=True)
    options = f"--seeds {' '.join(map(str, args.seeds))} --num_images {args.num_images}"
    provenance = {"command": f"python benchmarks/previous_range.py {options}", "num_images": args.num_images}
    provenance |= {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
    provenance |= {"torch": torch.__version__}
    (HERE / "previous_range.json").write_text(json.dumps({"provenance": provenance, "rows": rows}, indent=1) + "\n")
    (HERE / "previous_range.md").write_text(markdown(rows, provenance), encoding="utf-8")


if __name__ == "__main__":
    main()
