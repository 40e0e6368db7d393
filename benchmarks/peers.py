"""One evaluation of a denoiser on the CPU: ours beside what a user would pick instead; writes peers.json and peers.md.

    python benchmarks/peers.py prepare --models cifar dit mnist     # exports, int8 calibration, compiler caches
    python benchmarks/peers.py time --models cifar --threads 1      # processor time; --threads 2: wall time
    python benchmarks/peers.py quality                              # whole trajectories of the packaged teacher
    python benchmarks/peers.py table

All arms run in turns in one process. The extra modiff[peers] brings OpenVINO, NNCF and onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.compiling.modes import compile as compile_student
from modiff.lit.bench.clocks import peak_memory, spread
from modiff.lit.callbacks.provenance import device_name, git_commit
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

HERE = Path(__file__).parent
MODELS = {"cifar": "ddpm-cifar10", "dit": "dit-s-2-256", "mnist": "mnist"}
Evaluate = Callable[[Tensor, Tensor], Tensor]
PTQ = modiff.QuantConfig.preset("w8a8-ptq")
OURS = modiff.QuantConfig(
    weight=modiff.QuantSpec(8, "channel"),
    activation=modiff.QuantSpec(8, "sample"),
    modulation=modiff.Modulation(),
)


class Denoiser(nn.Module):
    """``forward(x, t)`` of a teacher, a tensor in and out, as exporters want it; labels are fixed."""

    def __init__(self, model: nn.Module, labels: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("labels", labels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """One evaluation; ``t`` is int64 ``[B]``."""
        if self.labels is None:
            return self.model(x, t, return_dict=False)[0]
        return self.model(x, timestep=t, class_labels=self.labels, return_dict=False)[0]


class Case:
    """A teacher at one batch size, and inputs that drift as along a trajectory."""

    def __init__(self, name: str, batch: int, work: Path) -> None:
        self.name, self.batch = name, batch
        self.work = work / f"{name}-{batch}"
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        spec = TeacherSpec(MODELS[name], random=name != "mnist")
        self.teacher = load_teacher(spec)
        model = self.teacher.denoiser.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        labels = torch.arange(batch) % 1000 if name == "dit" else None
        self.denoiser = Denoiser(model, labels).eval()
        shape = (batch, *self.teacher.sample_shape)
        ends = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        self.ends = ends[0], 0.5 * ends[1]

    def at(self, k: int) -> tuple[Tensor, Tensor]:
        """X and t of the k-th evaluation of 50."""
        share = min(1.0, k / 49)
        return torch.lerp(*self.ends, share), torch.full((self.batch,), round(999 * (1 - share)))


def eager(case: Case) -> Evaluate:
    """PyTorch as it is."""
    return case.denoiser


def compiled(case: Case) -> Evaluate:
    """torch.compile in float32."""
    return torch.compile(copy.deepcopy(case.denoiser), dynamic=False)


def compiled_cast(case: Case) -> Evaluate:
    """torch.compile of the model cast to bfloat16."""
    model = torch.compile(copy.deepcopy(case.denoiser).to(torch.bfloat16), dynamic=False)
    return lambda x, t: model(x.bfloat16(), t).float()


def compiled_autocast(case: Case) -> Evaluate:
    """torch.compile under autocast to bfloat16."""
    model = torch.compile(copy.deepcopy(case.denoiser), dynamic=False)

    def run(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, t).float()

    return run


def openvino(case: Case, precision: str, int8: bool = False) -> Evaluate:
    """OpenVINO; int8 by NNCF with its default settings, calibrated on inputs of the teacher's trajectories."""
    import openvino as ov

    core = ov.Core()
    compiled_model = core.compile_model(
        core.read_model(int8_file(case) if int8 else ir_file(case)),
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1},
    )
    request = compiled_model.create_infer_request()

    def run(x: Tensor, t: Tensor) -> Tensor:
        found = request.infer([x.contiguous().numpy(), t.numpy()], share_inputs=True)
        return torch.from_numpy(found[0].copy())

    return run


def ir_file(case: Case) -> Path:
    """The teacher in OpenVINO's format."""
    import openvino as ov

    path = case.work / "float.xml"
    if not path.exists():
        plain = copy.deepcopy(case.denoiser).to(memory_format=torch.contiguous_format)
        ov.save_model(ov.convert_model(plain, example_input=case.at(0)), path, compress_to_fp16=False)
    return path


def int8_file(case: Case) -> Path:
    """The teacher quantized by NNCF."""
    import nncf
    import openvino as ov

    path = case.work / "int8.xml"
    if not path.exists():
        inputs = [[x.contiguous().numpy(), t.numpy()] for x, t in calibration_inputs(case)]
        model = ov.Core().read_model(ir_file(case))
        ov.save_model(nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs)), path, compress_to_fp16=False)
    return path


def calibration_inputs(case: Case, count: int = 25) -> list[tuple[Tensor, Tensor]]:
    """Inputs of every second evaluation of the teacher's own trajectory; of random weights, of the drift."""
    if case.name != "mnist":
        return [case.at(2 * k) for k in range(max(6, 24 // case.batch))]
    found: list[tuple[Tensor, Tensor]] = []

    def keep(i: int, t: Any, x: Tensor) -> None:
        if i % 2 == 0:
            found.append((x.clone(), torch.full((case.batch,), int(t))))

    trajectory_images(case, case.denoiser, seed=1000, on_evaluation=keep)
    return found[:count]


def onnxruntime(case: Case) -> Evaluate:
    """Onnxruntime in float32."""
    import onnxruntime as ort

    path = case.work / "float.onnx"
    if not path.exists():
        plain = copy.deepcopy(case.denoiser).to(memory_format=torch.contiguous_format)
        torch.onnx.export(plain, case.at(0), path, dynamo=True, input_names=["x", "t"], external_data=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(
            session.run(None, dict(zip(names, [x.contiguous().numpy(), t.numpy()], strict=True)))[0]
        )

    return run


def pt2e(case: Case) -> Evaluate:
    """PyTorch's own int8 for the CPU."""
    from torch.ao.quantization.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torch.ao.quantization.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    exported = torch.export.export(case.denoiser, case.at(0)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for x, t in calibration_inputs(case):
        prepared(x, t)
    return torch.compile(convert_pt2e(prepared), dynamic=False)


class Ours:
    """A student, compiled by modiff.compile."""

    def __init__(self, case: Case, config: Any, **options: Any) -> None:
        self.model = copy.deepcopy(case.denoiser)
        self.student = modiff.quantize(self.model.model, config)
        compile_student(self.student, **options)

    def trajectory(self) -> Any:
        """Around the evaluations of a batch."""
        return modiff.trajectory(self.student)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """One evaluation."""
        return self.model(x, t)


ARMS: dict[str, Callable[[Case], Any]] = {
    "eager fp32": eager,
    "compiled fp32": compiled,
    "compiled bf16, cast": compiled_cast,
    "compiled bf16, autocast": compiled_autocast,
    "OpenVINO fp32": lambda case: openvino(case, "f32"),
    "OpenVINO bf16": lambda case: openvino(case, "bf16"),
    "OpenVINO int8 (NNCF)": lambda case: openvino(case, "f32", int8=True),
    "OpenVINO int8 + bf16 (NNCF)": lambda case: openvino(case, "bf16", int8=True),
    "onnxruntime fp32": onnxruntime,
    "PyTorch PT2E int8": pt2e,
    "modiff W8A8 modulated": lambda case: Ours(case, OURS),
    "modiff W8A8 modulated, rest in bf16": lambda case: Ours(case, OURS, compute_dtype="bfloat16"),
    "modiff W8A8 modulated, measured choice": lambda case: Ours(case, OURS, choose="measured"),
}
QUALITY_ONLY = {"modiff W8A8 plain PTQ": lambda case: Ours(case, PTQ)}


def build(case: Case, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arms that this machine has, and why others are missing."""
    arms, missing = {}, {}
    for name in names:
        start = time.perf_counter()
        try:
            arm = {**ARMS, **QUALITY_ONLY}[name](case)
            with arm.trajectory() if isinstance(arm, Ours) else nullcontext():
                for k in range(2):
                    arm(*case.at(k))
        except Exception as error:  # whatever another library raises
            missing[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error) else repr(error)
            )
            print(f"  {name}: {missing[name]}", flush=True)
            continue
        arms[name] = arm
        print(f"  {name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    return arms, missing


@torch.no_grad()
def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of evaluations of all arms, in turns: wall time, and the process' time on its processors."""
    arms, missing = build(case, args.arms)
    times: dict[str, list[float]] = {name: [] for name in arms}
    with ExitStack() as stack:
        for arm in arms.values():
            if isinstance(arm, Ours):
                stack.enter_context(arm.trajectory())
            for k in range(2):
                arm(*case.at(k))
        for turn in range(args.rounds):
            for name, arm in arms.items():
                x, t = case.at(2 + turn)
                clock = time.process_time if args.threads == 1 else time.perf_counter
                start = clock()
                arm(x, t)
                times[name].append(clock() - start)
    memory = {}
    for name, arm in arms.items() if args.memory else ():

        def work(arm: Any = arm) -> None:
            with arm.trajectory() if isinstance(arm, Ours) else nullcontext():
                for k in range(2):
                    arm(*case.at(k))

        gc.collect()
        memory[name] = peak_memory(work, torch.device("cpu"))[0]
    found = {name: {"seconds": spread(values), "peak_mib": memory.get(name)} for name, values in times.items()}
    return {"arms": found, "missing": missing, "rounds": args.rounds}


def trajectory_images(case: Case, arm: Any, seed: int, on_evaluation: Any = None) -> Tensor:
    """Images in [0, 1] of one batch: DDIM, 50 steps, from the noise of a seed."""
    noise = indexed_noise(seed, list(range(case.batch)), case.teacher.sample_shape, 0)
    noise = noise.contiguous(memory_format=torch.channels_last)
    scheduler = make_scheduler("ddim", case.teacher.scheduler_config)
    with arm.trajectory() if isinstance(arm, Ours) else nullcontext():
        call = lambda x, t: arm(x, torch.as_tensor(t).expand(case.batch).contiguous())  # noqa: E731
        images = sample(call, scheduler, noise, 50, on_evaluation=on_evaluation)
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def quality(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """PSNR of whole trajectories to the float32 images from the same noise."""
    wanted = {seed: trajectory_images(case, case.denoiser, seed) for seed in args.seeds}
    arms, missing = build(case, [*(n for n in args.arms if n != "eager fp32"), *QUALITY_ONLY])
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        values = []
        for seed in args.seeds:
            error = (trajectory_images(case, arm, seed) - wanted[seed]).square().flatten(1).mean(1)
            values += (-10 * error.clamp(min=1e-12).log10()).tolist()
        found[name] = {"psnr_db": sum(values) / len(values), "images": len(values)}
        print(f"  {name}: {found[name]['psnr_db']:.2f} dB", flush=True)
    return {"arms": found, "missing": missing, "seeds": args.seeds}


def provenance() -> dict[str, Any]:
    """Machine and versions."""
    versions = {p: metadata.version(p) for p in ("torch", "diffusers", "openvino", "nncf", "onnxruntime")}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    device = device_name(torch.device("cpu"))
    return {**versions, "device": device, "cores": os.cpu_count(), "has": has, "git_commit": git_commit()}


def main() -> None:
    """One step of the benchmark; results are merged into the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "time", "quality", "table"))
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=[*ARMS])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--output", type=Path, default=HERE / "peers.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").absolute()))
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.models if args.step != "table" else ():
        if args.step == "quality" and name != "mnist":
            continue
        print(f"{name}, batch {args.batch}, {args.threads} thread(s)", flush=True)
        case = Case(name, args.batch, args.work)
        if args.step == "prepare":
            with torch.no_grad():
                build(case, args.arms)
            continue
        key = f"{name}/{args.batch}" + (f"/{args.threads}" if args.step == "time" else "")
        entry = measure(case, args) if args.step == "time" else quality(case, args)
        into = results.setdefault(args.step, {}).setdefault(key, {"arms": {}, "missing": {}})
        into["arms"].update(entry.pop("arms"))
        into["missing"].update(entry.pop("missing"))
        into.update(entry)
        results["provenance"] = provenance()
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    from peers_table import markdown

    if args.output.exists():
        args.output.with_suffix(".md").write_text(markdown(results))


if __name__ == "__main__":
    main()
