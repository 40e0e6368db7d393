"""Ten minutes on a GPU: ``check`` (at most 240 s), then ``bench`` (at most 360 s). Each writes JSON and prints a table.

    python benchmarks/gpu.py check --output runs/gpu
    python benchmarks/gpu.py bench --output runs/gpu [--batch_size 512] [--sd15]

``check``: the ceilings of this GPU (copies, bf16 and int8 products of the libraries), sums of every kernel against
float64 on random and extreme codes, and tuned blocks for the products of the two models (``table.json``).

``bench``: the 35.7M UNet of DDPM at batch 128 and DiT-XL/2 at batch 64, random weights, arms in turns: teacher in bf16
eager, compiled, compiled with a CUDA graph; plain W8A8; modulated; the best execution of each operator, by measured
time. Then the quality of W8A8 modulated on the packaged teacher, beside what simulation on the CPU gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.teachers.architectures import ARCHITECTURES, random_denoiser
from modiff.teachers.zoo import TeacherSpec, load_teacher

SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TUNED = 20
"""Products that ``check`` tunes: those with the most multiply-accumulates."""
DEADLINES = {"check": 240.0, "bench": 360.0}


@dataclass
class Model:
    """A denoiser and its arguments.

    Args:
        name: For the table.
        build: Makes it, in float32 on the CPU.
        arguments: Makes arguments for a batch.
        batch: Its size.
    """

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[int], dict[str, Tensor]]
    batch: int


def models(batch: int | None, sd15: bool) -> list[Model]:
    """What is measured by default, at another batch, or with an SD-1.5-size UNet too."""

    def image(size: int, channels: int) -> Callable[[int], dict[str, Tensor]]:
        return lambda n: {"x": torch.randn(n, channels, size, size), "t": torch.full((n,), 500)}

    def dit(n: int) -> dict[str, Tensor]:
        return {**image(32, 4)(n), "class_labels": torch.arange(n) % 1000}

    def text(n: int) -> dict[str, Tensor]:
        return {**image(64, 4)(n), "encoder_hidden_states": torch.randn(n, 77, 768)}

    found = [
        Model("DDPM 35.7M", lambda: random_denoiser("", ARCHITECTURES["ddpm-cifar10"]), image(32, 3), batch or 128),
        Model("DiT-XL/2", lambda: random_denoiser("", ARCHITECTURES["dit-xl-2-256"]), dit, batch or 64),
    ]
    return [*found, Model("SD-1.5 size", lambda: random_denoiser("", SD15), text, batch or 8)] if sd15 else found


class Clock:
    """Says what time is left, so that a call ends by itself with what it has."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of a call, the device awaited; three calls warm up."""
    for _ in range(min(3, repeats)):
        function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """Copy bandwidth in GB/s, and products of the libraries in TFLOP/s (TOP/s), on random data."""
    source = torch.randn(size * size * 8, device=device)
    target = torch.empty_like(source)
    copied = median_ms(lambda: target.copy_(source), device, 20)
    half = torch.randn(size, size, device=device).bfloat16()
    codes = torch.randint(-127, 128, (size, size), dtype=torch.int8).to(device)
    bf16 = median_ms(lambda: half @ half, device, 20)
    int8 = median_ms(lambda: torch._int_mm(codes, codes.t()), device, 20)
    operations = 2 * size**3 / 1e9
    gbps = 2 * source.numel() * 4 / copied / 1e6
    return {"copy_gb_per_s": gbps, "bf16_tflop_per_s": operations / bf16, "int8_top_per_s": operations / int8}


def exactness(products: Sequence[Any], device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Whether the sums of each product are exact, with random codes and with all codes at their extremes."""
    from modiff.kernels.triton import launch, tune

    rows = []
    for product in products:
        if clock.left < 0:
            break
        blocks = launch.table_for(device).blocks(product)
        small = (
            replace(product, rows=min(product.rows, 2 * blocks.rows + 3)) if product.run == product.depth else product
        )
        extreme = torch.full((5, small.depth), 127, dtype=torch.int8, device=device)
        sums = torch.full((5, 128), -77777, dtype=torch.int32, device=device)
        weight = torch.full((128, small.depth), -127, dtype=torch.int8, device=device)
        launch.product(sums, extreme, weight, torch.ones(128, device=device), None, None, 1, False, True, blocks)
        exact = bool((sums == -127 * 127 * small.depth).all()) and tune.check(product, blocks, device)
        rows.append({"product": asdict(product), "blocks": blocks.key, "exact": exact})
    return rows


def check(given: argparse.Namespace, device: torch.device, chosen: Sequence[Model]) -> dict[str, Any]:
    """The first call."""
    from modiff.kernels.triton import launch, tune

    clock = Clock(DEADLINES["check"])
    found: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__}
    found["ceilings"] = ceilings(device, given.size)
    products: dict[Any, None] = {}
    for model in chosen:
        denoiser = model.build().to(device).half() if device.type == "cuda" else model.build()
        inputs = {key: cast(value, denoiser).to(device) for key, value in model.arguments(model.batch).items()}
        products.update(dict.fromkeys(tune.products_of(denoiser, *inputs_of(denoiser, inputs))))
    largest = sorted(products, key=lambda p: -p.rows * p.columns * p.depth)[: given.tuned]
    found["exact"] = exactness(largest, device, clock)
    table, rows = launch.table_for(device), []
    for product in largest:
        if clock.left < 30 or device.type != "cuda":
            break
        table, row = tune.tune([product], device, table)
        rows += [{**each, "product": asdict(each["product"]), "blocks": each["blocks"].key} for each in row]  # type: ignore[call-overload, attr-defined]
    found["tuned"] = rows
    (given.output / "table.json").write_text(json.dumps(table.to_json(), indent=1) + "\n")
    return found


def cast(value: Tensor, model: nn.Module) -> Tensor:
    """An argument in the dtype of a model."""
    return value.to(next(model.parameters()).dtype) if value.is_floating_point() else value


def inputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The arguments in the order of the forward of diffusers' models."""
    order = ["x", "t", "encoder_hidden_states"] if "class_labels" not in inputs else ["x", "t", "class_labels"]
    return [inputs[key] for key in order if key in inputs]


ARMS: dict[str, dict[str, Any]] = {
    "bf16 eager": {"preset": None},
    "bf16 compiled": {"preset": None, "compile": True},
    "bf16 compiled, CUDA graph": {"preset": None, "compile": True, "graph": True},
    "W8A8 plain, CUDA graph": {"preset": "w8a8-ptq", "graph": True},
    "W8A8 modulated": {"preset": "w8a8-modiff"},
    "W8A8 modulated, CUDA graph": {"preset": "w8a8-modiff", "graph": True},
    "W8A8 modulated, norms fused, CUDA graph": {"preset": "w8a8-modiff", "graph": True, "fused": True},
    "the same, range of the evaluation before": {
        "preset": "w8a8-modiff",
        "graph": True,
        "fused": True,
        "range": "previous",
    },
    "best per operator, CUDA graph": {"preset": "w8a8-modiff", "graph": True, "fused": True, "choose": True},
}


def arm(name: str, model: Model, device: torch.device) -> nn.Module:
    """A denoiser ready to be timed. Students run in float16, for their states hold float16."""
    options, denoiser = ARMS[name], model.build().eval().requires_grad_(False)
    on_gpu = device.type == "cuda"
    if options["preset"] is None:
        denoiser = denoiser.to(device, torch.bfloat16 if on_gpu else torch.float32)
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mode = "max-autotune-no-cudagraphs" if not options.get("graph") else "reduce-overhead"
        return torch.compile(denoiser, mode=mode) if options.get("compile") and on_gpu else denoiser  # type: ignore[return-value]
    denoiser = denoiser.to(device, torch.float16 if on_gpu else torch.float32)
    denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = modiff.QuantConfig.preset(options["preset"])
    # Asymmetric 8-bit codes need 9 bits.
    spec = modiff.QuantSpec(8, granularity="sample", range=options.get("range", "dynamic"))
    config = replace(config, activation=spec)
    if config.modulation is not None and on_gpu:
        state = replace(config.modulation, state_dtype="float16", reconstruction_dtype="int16")
        config = replace(config, modulation=state)
    student = modiff.quantize(denoiser, config)
    extra = {"choose": "measured"} if options.get("choose") else {}
    if on_gpu:
        mode = "auto" if options.get("fused") else "whole" if options.get("graph") else "stages"
        modiff.compile(student, mode, cuda_graph=bool(options.get("graph")), **extra)
    return student


def bench_model(model: Model, device: torch.device, clock: Clock, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Each arm's time of one evaluation and its peak memory; two rounds of all arms, one after the other."""
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(given.rounds):
        for name in ARMS:
            if clock.left < (0 if rows.get(name) else -60) or "error" in rows.get(name, {}):
                continue
            try:
                found = time_arm(name, model, device, given.repeats)
            except Exception as error:  # one arm that fails must not take the others with it: the lease is short
                rows[name] = {"model": model.name, "arm": name, "error": f"{type(error).__name__}: {error}"[:300]}
                continue
            row = rows.setdefault(name, {"model": model.name, "batch": model.batch, "arm": name, "ms": [], **found})
            row["ms"].append(found["ms_per_evaluation"])
            print(turn, row, flush=True)
    return [{**row, "ms_per_evaluation": statistics.median(row["ms"])} if "ms" in row else row for row in rows.values()]


def time_arm(name: str, model: Model, device: torch.device, repeats: int) -> dict[str, Any]:
    """Build, run and time one arm."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    denoiser = arm(name, model, device)
    inputs = {key: cast(value, denoiser).to(device) for key, value in model.arguments(model.batch).items()}
    step = 1 + 0.01 * torch.arange(8, device=device)
    state = {"i": 0}

    def evaluate() -> None:
        state["i"] += 1
        x = inputs["x"] * step[state["i"] % 8].to(inputs["x"].dtype)
        denoiser(*inputs_of(denoiser, {**inputs, "x": x}))

    is_student = hasattr(denoiser, "_modiff_state")
    with torch.no_grad():
        if is_student:
            with modiff.trajectory(denoiser):
                ms = median_ms(evaluate, device, repeats)
        else:
            ms = median_ms(evaluate, device, repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    backends: dict[str, int] = {}
    for row in modiff.describe(denoiser) if is_student else ():
        backends[row.backend.split(" ")[0]] = backends.get(row.backend.split(" ")[0], 0) + 1
    return {"ms_per_evaluation": ms, "peak_mib": peak, "backends": backends}


def quality(device: torch.device, images: int, steps: int) -> dict[str, float]:
    """PSNR in dB of W8A8 students of the packaged teacher to its images, here and simulated on the CPU."""
    from modiff.teachers.sampling.loop import sample
    from modiff.teachers.sampling.schedulers import make_scheduler

    def draw(preset: str | None, where: torch.device, backend: str) -> Tensor:
        teacher = load_teacher(TeacherSpec("mnist"))
        denoiser = teacher.denoiser.to(where)
        noise = torch.randn(images, *teacher.sample_shape, generator=torch.Generator().manual_seed(0)).to(where)
        scheduler = make_scheduler("ddim", teacher.scheduler_config)
        with torch.no_grad():
            if preset is None:
                found = sample(denoiser, scheduler, noise, steps)
            else:
                student = modiff.quantize(denoiser, replace(modiff.QuantConfig.preset(preset), backend=backend))
                with modiff.trajectory(student):
                    found = sample(student, scheduler, noise, steps)
        return found.cpu().double().clamp(-1, 1) / 2 + 0.5

    cpu = torch.device("cpu")
    teacher = {where: draw(None, where, "auto") for where in {cpu, device}}
    found = {}
    for name, preset, where, backend in (
        ("modulated, here", "w8a8-modiff", device, "auto"),
        ("plain, here", "w8a8-ptq", device, "auto"),
        ("modulated, simulated on the CPU", "w8a8-modiff", cpu, "simulate"),
    ):
        error = (draw(preset, where, backend) - teacher[where]).square().flatten(1).mean(1)
        found[name] = float((-10 * error.log10()).mean())
    return found


def bench(given: argparse.Namespace, device: torch.device, chosen: Sequence[Model]) -> dict[str, Any]:
    """The second call."""
    clock = Clock(DEADLINES["bench"])
    rows = [row for model in chosen for row in bench_model(model, device, clock, given)]
    found: dict[str, Any] = {"device": name_of(device), "torch": torch.__version__, "rows": rows}
    found["psnr_db"] = quality(device, given.images, given.steps)
    (given.output / "bench.md").write_text(markdown(found))
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table for the README."""
    lines = [f"{found['device']}, torch {found['torch']}, medians; `python benchmarks/gpu.py bench`", ""]
    lines += [
        "| model, batch | arm | ms per evaluation | over compiled bf16 with CUDA graph | peak MiB |",
        "|---|---|---|---|---|",
    ]
    base = {
        r["model"]: r["ms_per_evaluation"]
        for r in found["rows"]
        if r["arm"] == "bf16 compiled, CUDA graph" and "ms" in r
    }
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"| {row['model']} | {row['arm']} | failed: {row['error']} | | |")
            continue
        ratio = f"{base[row['model']] / row['ms_per_evaluation']:.2f}x" if row["model"] in base else ""
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(
            f"| {row['model']}, {row['batch']} | {row['arm']} | {row['ms_per_evaluation']:.2f} | {ratio} | {peak} |"
        )
    lines += ["", "PSNR to the packaged teacher's images in dB: "]
    lines[-1] += ", ".join(f"{name} {value:.1f}" for name, value in found["psnr_db"].items()) + "."
    return "\n".join(lines) + "\n"


def name_of(device: torch.device) -> str:
    """For tables."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry run)"


def main(arguments: Sequence[str] | None = None, chosen: Sequence[Model] | None = None) -> int:
    """The command; ``chosen`` replaces the models in a dry run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=("check", "bench"))
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch_size", type=int, default=None, help="of all models; 512 is of interest")
    parser.add_argument("--sd15", action="store_true", help="also a UNet of the size of Stable Diffusion 1.5")
    parser.add_argument("--size", type=int, default=8192, help="of the products that give the ceilings")
    parser.add_argument("--tuned", type=int, default=TUNED)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; --device cpu is a dry run that needs TRITON_INTERPRET=1")
    given.output.mkdir(parents=True, exist_ok=True)
    chosen = chosen or models(given.batch_size, given.sd15)
    found = (check if given.call == "check" else bench)(given, device, chosen)
    (given.output / f"{given.call}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1)[-8000:])
    return 0 if all(row["exact"] for row in found.get("exact", [])) else 1


if __name__ == "__main__":
    raise SystemExit(main())
