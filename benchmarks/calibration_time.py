"""Wall time and memory of whole calibrations: writes calibration_time.json beside itself, shown by calibration.md.

python benchmarks/calibration_time.py [--rows mnist-gptq mnist-brecq ddpm-cifar10-gptq] [--threads 2]

Give it an otherwise idle machine. Each row runs in a process of its own, whose peak resident memory the kernel keeps;
what was there before the calibration (the teacher, PyTorch) is not counted. Rows that are not named keep their figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modiff
from modiff.calibration import calibrate
from modiff.lit.bench.clocks import peak_memory
from modiff.lit.callbacks.provenance import device_name, git_commit, package_versions
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

OUTPUT = Path(__file__).parent / "calibration_time.json"
PRESET, IMAGES, SEED = "w4a4-modiff-paper", 16, 1000
ROWS: dict[str, tuple[TeacherSpec, str, int]] = {
    "mnist-gptq": (TeacherSpec("mnist"), "gptq", 50),
    "mnist-brecq": (TeacherSpec("mnist"), "brecq", 50),
    "ddpm-cifar10-gptq": (TeacherSpec("ddpm-cifar10", random=True), "gptq", 10),
}
"""Teacher, method and DDIM steps by name; recorded are 8 evaluations of a trajectory, whatever its length."""


def measure(name: str) -> dict[str, Any]:
    """One calibration, here."""
    spec, method, steps = ROWS[name]
    teacher = load_teacher(spec)
    scheduler = make_scheduler("ddim", teacher.scheduler_config)
    noise = indexed_noise(SEED, list(range(IMAGES)), teacher.sample_shape)
    parameters = sum(p.numel() for p in teacher.denoiser.parameters())
    stages: list[dict[str, Any]] = []
    begun = time.perf_counter()

    def run(student: nn.Module) -> None:
        with modiff.trajectory(student):
            sample(student, scheduler, noise, steps)

    def progress(done: int, total: int, what: str) -> None:
        stages.append({"seconds": time.perf_counter() - begun, "what": what if len(what) < 40 else f"{what[:40]} .."})
        print(f"{name}: {done} of {total}, {stages[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)

    def work() -> None:
        nonlocal begun
        begun = time.perf_counter()
        calibrate(teacher.denoiser, modiff.QuantConfig.preset(PRESET), run, method, progress=progress)
        stages.append({"seconds": time.perf_counter() - begun, "what": "all"})

    growth, _ = peak_memory(work, torch.device("cpu"))
    return {
        "name": name,
        "parameters": parameters,
        "method": method,
        "steps": steps,
        "images": IMAGES,
        "threads": torch.get_num_threads(),
        "seconds": stages[-1]["seconds"],
        "extra_mib": growth,
        "stages": stages,
    }


def main() -> None:
    """Measure the rows that are asked for, each in a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.child)))
        return
    kept = json.loads(OUTPUT.read_text())["rows"] if OUTPUT.exists() else []
    rows = {row["name"]: row for row in kept}
    for name in args.rows:
        command = [sys.executable, __file__, "--child", name, "--threads", str(args.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        provenance = {
            "command": "python benchmarks/calibration_time.py",
            "git_commit": git_commit(),
            **package_versions("modiff", "torch", "diffusers"),
            "device": device_name(torch.device("cpu")),
        }
        OUTPUT.write_text(json.dumps({"provenance": provenance, "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
