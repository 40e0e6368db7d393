"""Size, time and memory of packed checkpoints: writes its section of cpu.md beside itself.

python benchmarks/checkpoint.py [--bits 2 3 4 5 6 7 8] [--repeats 5]

The model is the 35.7M UNet of DDPM for CIFAR-10 with random weights (sizes and times do not depend on them). Every load
runs in a process of its own, whose peak resident memory the kernel keeps; what was imported before is not counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import modiff
from modiff.lit.bench.clocks import peak_memory
from modiff.lit.callbacks.provenance import device_name, git_commit
from modiff.lit.commands.bench import has_vnni
from modiff.teachers.zoo import TeacherSpec, load_teacher

PAGE = Path(__file__).parent / "cpu.md"
BEGIN, END = "<!-- checkpoint: begin -->", "<!-- checkpoint: end -->"
TEACHER = TeacherSpec("ddpm-cifar10", random=True)
CPU = torch.device("cpu")
TARGETS = {"size": 0.15, "seconds": 2.0, "memory": 1.3}


def mib(folder: Path) -> float:
    """All files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20


def load_in_here(folder: Path, where: str) -> dict[str, float]:
    """Load once, onto the meta device or a module that is in memory."""
    teacher = load_teacher(TEACHER).denoiser
    if where == "meta":
        teacher = teacher.to("meta")
    found: dict[str, Any] = {}

    def work() -> None:
        start = time.perf_counter()
        found["student"] = modiff.load(folder, teacher, keep_teacher=False)
        found["seconds"] = time.perf_counter() - start

    growth, _ = peak_memory(work, CPU)
    return {"seconds": found["seconds"], "growth_mib": growth}


def in_child(folder: Path, where: str) -> dict[str, float]:
    """The same in a new process."""
    command = [sys.executable, __file__, "--child", str(folder), "--where", where]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def outputs(student: torch.nn.Module) -> torch.Tensor:
    """Three evaluations of one image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 32, 32, generator=generator)
    with modiff.trajectory(student):
        return torch.stack(
            [student(x * scale, torch.tensor(t))[0] for scale, t in ((1, 999), (0.99, 979), (0.98, 959))]
        )


def measure(bits: int, teacher: torch.nn.Module, full_mib: float, folder: Path, repeats: int) -> dict[str, Any]:
    """One row."""
    config = modiff.QuantConfig.preset(f"w{bits}a6-modiff-paper")
    student = modiff.quantize(copy.deepcopy(teacher), config)
    start = time.perf_counter()
    modiff.save(student, folder)
    saving = time.perf_counter() - start
    same = torch.equal(outputs(student), outputs(modiff.load(folder, copy.deepcopy(teacher).to("meta"))))
    runs = {where: [in_child(folder, where) for _ in range(repeats)] for where in ("meta", "memory")}
    packed = mib(folder)
    return {
        "bits": bits,
        "mib": packed,
        "ratio": packed / full_mib,
        "save_s": saving,
        "load_s": statistics.median(run["seconds"] for run in runs["meta"]),
        "load_max_s": max(run["seconds"] for where in runs.values() for run in where),
        "meta_growth_mib": max(run["growth_mib"] for run in runs["meta"]),
        "memory_growth_mib": max(run["growth_mib"] for run in runs["memory"]),
        "same_outputs": same,
    }


def section(rows: list[dict[str, Any]], full_mib: float, command: str) -> str:
    """Markdown between the marks."""
    lines = [
        BEGIN,
        "## Checkpoints",
        "",
        f"    {command}",
        "",
        f"The 35.7M UNet of DDPM for CIFAR-10, random weights, `w{{bits}}a6-modiff`; its fp32 safetensors file takes "
        f"{full_mib:.1f} MiB. Sizes are those of the whole folder. Times are of a verified load onto a model on the "
        "meta device, medians and the slowest of all; memory is the largest growth of the process' peak resident "
        "memory, over the packed size: onto the meta device, and onto a model that is in memory (its own weights not "
        "counted, `keep_teacher=False`).",
        "",
        "| weights | MiB | of fp32 | save, s | load, s (slowest) | peak growth / packed: meta | memory | outputs |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        lines.append(
            f"| W{row['bits']} | {row['mib']:.2f} | {row['ratio']:.4f} | {row['save_s']:.2f} | {row['load_s']:.2f} "
            f"({row['load_max_s']:.2f}) | {row['meta_growth_mib'] / row['mib']:.2f} | "
            f"{row['memory_growth_mib'] / row['mib']:.2f} | {'bit for bit' if row['same_outputs'] else 'NO'} |"
        )
    lines += ["", *verdicts(rows), "", f"{machine()}.", END]
    return "\n".join(lines)


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The targets, met or not."""
    four = next((row for row in rows if row["bits"] == 4), None)
    slowest = max(row["load_max_s"] for row in rows)
    memory = max(max(row["meta_growth_mib"], row["memory_growth_mib"]) / row["mib"] for row in rows)
    found = [("slowest load, s", slowest, TARGETS["seconds"]), ("peak growth / packed", memory, TARGETS["memory"])]
    found = [("W4 folder / fp32 file", four["ratio"], TARGETS["size"]), *found] if four else found
    return [f"* {n}: {v:.3f}, target at most {t:g}: {'met' if v <= t else 'NOT met'}." for n, v, t in found]


def machine() -> str:
    """One line about where this ran."""
    vnni = "with VNNI" if has_vnni() else "without VNNI"
    return (
        f"{device_name(CPU)}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()} {vnni}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, commit {git_commit()}"
    )


def put(text: str, page: Path) -> None:
    """Replace the section, or append it."""
    old = page.read_text() if page.exists() else "# On the CPU\n\nWhat was measured on a CPU, with its command.\n"
    if BEGIN in old and END in old:
        before, after = old.split(BEGIN)[0], old.split(END)[1]
        page.write_text(before + text + after)
    else:
        page.write_text(old.rstrip("\n") + "\n\n" + text + "\n")


def main() -> None:
    """Measure, or be the child that loads once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--where", choices=("meta", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(load_in_here(args.child, args.where)))
        return
    teacher = load_teacher(TEACHER).denoiser
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        teacher.save_pretrained(folder / "full")
        full_mib = (folder / "full" / "diffusion_pytorch_model.safetensors").stat().st_size / 2**20
        rows = []
        for bits in args.bits:
            rows.append(measure(bits, teacher, full_mib, folder / f"w{bits}", args.repeats))
            print(rows[-1])
    command = f"python benchmarks/checkpoint.py --bits {' '.join(map(str, args.bits))} --repeats {args.repeats}"
    put(section(rows, full_mib, command), args.output)


if __name__ == "__main__":
    main()
