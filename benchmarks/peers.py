"""One evaluation of a denoiser on the CPU: ours beside what a user would pick instead; writes peers.json and peers.md.

    python benchmarks/peers.py prepare --threads 1     # exports, int8 calibrations, compiler caches; and --threads 2
    python benchmarks/peers.py --threads 1             # processor time of one thread
    python benchmarks/peers.py --threads 2             # wall time of two
    python benchmarks/peers.py quality                 # whole trajectories of the packaged teachers
    python benchmarks/peers.py memory --threads 2
    python benchmarks/peers.py build                   # how long the C++ operators take to build, and to load
    python benchmarks/peers.py table                   # peers.md anew, from peers.json

Each model and batch size is a process of its own, in which all arms take turns; what peers.json holds already, measured
with the same sources and settings, is not measured again. The extra modiff[peers] brings OpenVINO, NNCF, onnxruntime
and torchao.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from peers_arms import ARMS, PACKAGED, Case, Ours, build, opened, reason, trajectory_images
from peers_table import markdown

import modiff
from modiff.lit.bench.clocks import spread
from modiff.lit.callbacks.provenance import device_name, git_commit

HERE = Path(__file__).parent
GROUPS = ("cifar/8", "cifar/1", "dit/8", "dit/1", "mnist/64", "mnist/8")
MEMORY = ("cifar/8", "dit/8", "mnist/64")
SHORTEST_TURN = 0.2
"""Seconds: faster arms make several evaluations in a turn."""


def main() -> None:
    """Run one step over all groups that are missing, or one group in this process."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").absolute()))
    torch.set_num_threads(args.threads)
    if args.group is not None:
        run_group(args)
        return
    if args.step == "build":
        build_times(args)
    defaults = {"memory": MEMORY, "quality": tuple(f"{name}/8" for name in PACKAGED), "table": (), "build": ()}
    for group in args.groups or defaults.get(args.step, GROUPS):
        for arms in [[arm] for arm in args.arms] if args.step == "memory" else [args.arms]:
            if args.again or not_yet(args, group, arms):
                start = time.perf_counter()
                options = ["--group", group, "--threads", args.threads, "--rounds", args.rounds, "--work", args.work]
                options += ["--output", args.output, "--seeds", *args.seeds, "--arms", *arms]
                command = [sys.executable, __file__, args.step, *map(str, options)]
                subprocess.run(command, check=args.step != "memory")
                print(f"{args.step} {group}: {time.perf_counter() - start:.0f} s", flush=True)
            else:
                print(f"{args.step} {group}: measured already", flush=True)
    if args.output.exists():
        args.output.with_suffix(".md").write_text(markdown(json.loads(args.output.read_text()), notes(args.output)))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "step", nargs="?", choices=("prepare", "time", "quality", "memory", "build", "table"), default="time"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--groups", nargs="+", help=f"model/batch; default {' '.join(GROUPS)}")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--again", action="store_true", help="Measure also what was measured.")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--output", type=Path, default=HERE / "peers.json")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    return parser.parse_args()


def notes(output: Path) -> str:
    """What a person wrote below the tables: it stays there."""
    path = output.with_name(output.stem + "_notes.md")
    return path.read_text() if path.exists() else ""


def key_of(args: argparse.Namespace, group: str) -> str:
    """Where a group's results lie in the step's."""
    return group if args.step == "quality" else f"{group}/{args.threads}"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What results must agree in to stand for each other."""
    own = {"time": {"rounds": args.rounds}, "quality": {"seeds": args.seeds}}.get(args.step, {})
    return {**own, "sources": sources()}


def sources() -> str:
    """Changes with modiff's sources, the arms and the versions of the libraries."""
    digest = hashlib.sha256(repr(sorted(versions().items())).encode())
    root = Path(modiff.__file__).parent
    rooms = ("kernels", "operators", "quantizers", "trajectory", "student", "compiling")
    paths = [p for room in rooms for p in (root / room).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    for path in [*sorted(paths), HERE / "peers_arms.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def not_yet(args: argparse.Namespace, group: str, arms: list[str]) -> bool:
    """Whether some arm of a group was not measured with these settings."""
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    entry = results.get(args.step, {}).get(key_of(args, group))
    same = entry is not None and entry.get("settings") == settings(args)
    return not same or bool(set(arms) - {*entry["arms"], *entry["missing"]})


@torch.no_grad()
def run_group(args: argparse.Namespace) -> None:
    """One group of one step, kept with what is there of the same settings."""
    name, batch = args.group.split("/")
    print(f"{args.step} {args.group}, {args.threads} thread(s)", flush=True)
    before = psutil.Process().memory_info().rss
    case = Case(name, int(batch), args.work)
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    arms: dict[str, Any] = {}
    for arm in args.arms:
        start = time.perf_counter()
        try:
            made = build(case, arm)
            if args.step == "memory":
                found[arm] = {"peak_mib": peak(case, made, before)}
            elif args.step != "prepare":
                arms[arm] = made
        except Exception as error:  # whatever another library raises
            missing[arm] = reason(error)
        print(f"  {arm}: {missing.get(arm, f'ready after {time.perf_counter() - start:.1f} s')}", flush=True)
    if args.step == "prepare":
        return
    if args.step == "time":
        found = measure(case, arms, args)
    elif args.step == "quality":
        found = quality(case, arms, args.seeds)
    keep(args, found, missing)


def keep(args: argparse.Namespace, found: dict[str, Any], missing: dict[str, str]) -> None:
    """Put results into the file."""
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    into = results.setdefault(args.step, {})
    key, own = key_of(args, args.group), settings(args)
    old = into.get(key, {})
    old = old if old.get("settings") == own and args.step != "time" else {"arms": {}, "missing": {}}
    arms = {**old["arms"], **found}
    reasons = {k: v for k, v in {**old["missing"], **missing}.items() if k not in found}
    into[key] = {"arms": arms, "missing": reasons, "settings": own, "provenance": provenance()}
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def measure(case: Case, arms: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an evaluation, all arms in turns; of one thread processor time, else wall time."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        for name, arm in arms.items():
            stack.enter_context(opened(arm))
            for k in range(2):
                arm(*case.at(k))
            start = time.perf_counter()
            arm(*case.at(2))
            counts[name] = max(1, min(10, round(SHORTEST_TURN / (time.perf_counter() - start))))
        for turn in range(args.rounds):
            for name, arm in arms.items():
                inputs = [case.at(3 + turn * counts[name] + i) for i in range(counts[name])]
                start = clock()
                for x, t in inputs:
                    arm(x, t)
                times[name].append((clock() - start) / counts[name])
    share = {name: arm.integer_share(case) for name, arm in arms.items() if isinstance(arm, Ours)}
    return {
        name: {"seconds": spread(values), "evaluations_per_turn": counts[name], "integer_share": share.get(name)}
        for name, values in times.items()
    }


def quality(case: Case, arms: dict[str, Any], seeds: list[int]) -> dict[str, Any]:
    """PSNR of whole trajectories to the float32 images from the same noise, and the error of single evaluations.

    The latter is that of the output for the inputs of the teacher's own trajectory: ``||student - teacher|| /
    ||teacher||`` in the first, the middle and the last evaluation.
    """
    wanted, steps = {}, []
    for seed in seeds:
        store = steps if seed == seeds[0] else []
        keep_step = lambda i, t, x, store=store: store.append((x.clone(), torch.full((case.batch,), int(t))))  # noqa: E731
        wanted[seed] = trajectory_images(case, case.denoiser, seed, keep_step)
    chosen = [steps[0], steps[len(steps) // 2], steps[-1]]
    outputs = [case.denoiser(x, t) for x, t in chosen]
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        values = []
        for seed in seeds:
            error = (trajectory_images(case, arm, seed) - wanted[seed]).square().flatten(1).mean(1)
            values += (-10 * error.clamp(min=1e-12).log10()).tolist()
        exact = max(values) >= 120
        found[name] = {"psnr_db": None if exact else sum(values) / len(values), "images": len(values)}
        if not isinstance(arm, Ours):  # which needs the evaluations between
            errors = [((arm(x, t) - o).norm() / o.norm()).item() for (x, t), o in zip(chosen, outputs, strict=True)]
            found[name]["relative_errors"] = errors
        print(f"  {name}: {found[name]}", flush=True)
    return found


def peak(case: Case, arm: Any, before: int) -> float:
    """Peak resident memory of three evaluations, in MiB, beyond that of a process that has loaded nothing yet.

    The arm has compiled and warmed up before; weights in whatever form it keeps them are counted, and libraries that
    it alone loads. The teacher it was made from is freed.
    """
    case.denoiser = None  # type: ignore[assignment]
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with opened(arm):
        for k in range(3):
            arm(*case.at(k))
    text = Path("/proc/self/status").read_text()
    highest = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM"))
    return (highest - before) / 2**20


STARTS = """
import time
import torch, modiff
from modiff.kernels.cpp import build
start = time.perf_counter()
problem = build.problem()
print(problem or time.perf_counter() - start)
"""


def build_times(args: argparse.Namespace) -> None:
    """Seconds until the C++ operators are there: in a first process, with an empty cache, and in a second one."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "MODIFF_CACHE": cache}
        said = [
            subprocess.run([sys.executable, "-c", STARTS], env=env, capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
    first, second = (float(text) for text in said)
    print(f"C++ operators: built in {first:.1f} s; loaded by a second process in {second:.2f} s")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    results["build"] = {"first_s": first, "second_s": second, "provenance": provenance()}
    args.output.write_text(json.dumps(results, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of the libraries that are here."""
    found = {}
    for package in ("torch", "diffusers", "openvino", "nncf", "onnxruntime", "torchao"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance() -> dict[str, Any]:
    """Machine and versions."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    device = device_name(torch.device("cpu"))
    return {**versions(), "device": device, "cores": os.cpu_count(), "has": has, "git_commit": git_commit()}


if __name__ == "__main__":
    main()
