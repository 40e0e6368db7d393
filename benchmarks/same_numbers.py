"""The numbers of small students, recorded from one checkout and compared with another's: for changes that move none.

PYTHONPATH=OLD python benchmarks/same_numbers.py record old.json
PYTHONPATH=NEW python benchmarks/same_numbers.py record new.json [--only eager]
python benchmarks/same_numbers.py compare old.json new.json

Each case samples 8 images in 8 steps from the same noise, in one thread; the file holds the SHA-256 of the float32
images, and ``<file>.npz`` the images. Eager cases must be equal bit for bit; compiled ones within 1e-5 of the largest
value, since a graph may fuse differently. Only names that both checkouts have are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from torch import Tensor, nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.calibration import CalibrationSettings, calibrate

ASSETS = Path(modiff.__file__).parent / "teachers" / "assets" / "mnist"
STEPS, IMAGES = 8, 8
TOLERANCE = 1e-5
FAST = CalibrationSettings(evaluations=4, positions=512, samples=32, iterations=20, tuning_iterations=4)


def unet() -> nn.Module:
    """The packaged denoiser of digits."""
    return diffusers.UNet2DModel.from_pretrained(ASSETS / "unet").eval().requires_grad_(False)


def dit() -> nn.Module:
    """A transformer with random weights."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=16,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )
    # Its last layer starts at zero, which would hide all others.
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def images(student: nn.Module, denoise: Callable[[Tensor, Tensor], Tensor], contexts: Any = None) -> Tensor:
    """Images of one trajectory, float32."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(ASSETS / "scheduler")
    scheduler.set_timesteps(STEPS)
    size = student.config.sample_size
    x = torch.randn(IMAGES, 1, size, size, generator=torch.Generator().manual_seed(0))
    with modiff.trajectory(student, contexts=contexts):
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t), t, x).prev_sample
    return x


def unconditional(student: nn.Module) -> Tensor:
    """One denoiser call per step."""
    return images(student, lambda x, t: student(x, t).sample)


def guided(student: nn.Module) -> Tensor:
    """Guidance in two calls per step, each with a state of its own; the second sees shifted inputs."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        first, second = student(x, t).sample, student(x + 0.05, t).sample
        return first + 1.5 * (second - first)

    return images(student, denoise, contexts=("uncond", "cond"))


def labelled(student: nn.Module) -> Tensor:
    """A transformer's call, with classes."""
    classes = torch.arange(IMAGES)
    return images(student, lambda x, t: student(x, timestep=t.expand(IMAGES), class_labels=classes).sample)


def preset(name: str, **changes: Any) -> QuantConfig:
    """The settings of a preset of version 0.1, written out: presets may change."""
    bits, _, method = name.partition("-")
    weight, activation = (int(part) for part in bits[1:].split("a"))
    modulated = method == "modiff"
    config = QuantConfig(
        QuantSpec(weight, "channel"),
        QuantSpec(activation, "sample", symmetric=modulated and activation >= 6),
        Modulation() if modulated else None,
    )
    return dataclasses.replace(config, **changes)


def students() -> dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    """What makes each case's student, and how it samples."""
    symmetric = QuantSpec(6, "sample")
    static = QuantSpec(6, "tensor", range="calibrated", timestep_buckets=3)
    small = Modulation(reconstruction_dtype="int16", state_dtype="float16")
    configs: dict[str, QuantConfig] = {}
    for backend in ("auto", "simulate"):
        for name in ("w8a8-modiff", "w8a4-modiff", "w8a2-modiff", "w8a4-ptq", "w8a6-ptq"):
            configs[f"{name}/{backend}"] = preset(name, backend=backend)
        configs[f"int16/{backend}"] = preset("w8a6-modiff", modulation=small, backend=backend)
        configs[f"int16-asymmetric/{backend}"] = preset("w8a4-modiff", modulation=small, backend=backend)
        for name, changes in (
            ("refine", {"warmup": "refine"}),
            ("refresh", {"refresh_every": 3}),
            ("uncompensated", {"error_compensation": False}),
        ):
            configs[f"{name}/{backend}"] = preset("w8a4-modiff", modulation=Modulation(**changes), backend=backend)
    for granularity in ("tensor", "channel", "sample_channel", "group"):
        spec = QuantSpec(4, granularity, False, clip=0.9, group_size=3 if granularity == "group" else None)
        configs[f"{granularity}/auto"] = preset("w4a4-modiff", activation=spec)
    configs["mixed/auto"] = preset(
        "w4a4-modiff", rules=(Rule("conv_in", activation=None), Rule("*.conv1", modulation=None, activation=symmetric))
    )
    found: dict[str, Any] = {n: lambda c=c: (modiff.quantize(unet(), c), unconditional) for n, c in configs.items()}
    for backend in ("auto", "simulate"):
        base = preset("w8a4-modiff", backend=backend)
        found[f"guided/{backend}"] = lambda c=base: (modiff.quantize(unet(), c), guided)
        found[f"dit/{backend}"] = lambda c=base: (modiff.quantize(dit(), c), labelled)
        gptq = preset("w4a4-modiff", backend=backend)
        found[f"gptq/{backend}"] = lambda c=gptq: (
            calibrate(unet(), c, unconditional, "gptq", settings=FAST),
            unconditional,
        )
        ranges = preset("w8a6-modiff", activation=static, backend=backend)
        found[f"static/{backend}"] = lambda c=ranges: (
            calibrate(unet(), c, unconditional, "nearest", settings=FAST),
            unconditional,
        )
        tokens = preset("w8a4-modiff", activation=symmetric, backend=backend)
        tokens = dataclasses.replace(tokens, rules=(Rule("*", type="linear", activation=QuantSpec(6, "token")),))
        found[f"tokens/{backend}"] = lambda c=tokens: (modiff.quantize(dit(), c), labelled)
    return found


COMPILED = {
    "stages": ("w8a8-modiff/auto", "w8a4-modiff/auto", "w8a4-modiff/simulate", "int16/auto", "w8a4-ptq/auto",
               "static/auto", "dit/auto", "uncompensated/auto"),
    "blocks": ("dit/auto", "w8a4-modiff/simulate"),
    "whole": ("w8a4-modiff/auto", "int16/auto", "w8a4-ptq/auto"),
}  # fmt: skip


def record(path: Path, only: str) -> None:
    """Write every case's images and their hashes."""
    torch.set_num_threads(1)
    made, hashes, arrays = students(), {}, {}
    cases = [(name, "eager") for name in made]
    cases += [(name, mode) for mode, names in COMPILED.items() for name in names]
    for name, mode in cases:
        case = f"{name}/{mode}"
        if only not in case:
            continue
        torch.manual_seed(0)
        student, sample = made[name]()
        if mode != "eager":
            torch._dynamo.reset()
            modiff.compile(student, mode)
        found = sample(student)
        assert torch.isfinite(found).all(), case
        arrays[case] = found.numpy()
        hashes[case] = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        print(case, hashes[case][:16], flush=True)
    path.write_text(json.dumps(hashes, indent=1) + "\n")
    numpy.savez(f"{path}.npz", **arrays)


def compare(old: Path, new: Path) -> int:
    """Print every case that both files hold; return how many differ by more than is allowed."""
    ours, theirs = (json.loads(path.read_text()) for path in (new, old))
    arrays = [numpy.load(f"{path}.npz") for path in (old, new)]
    failures, shared = 0, [case for case in theirs if case in ours]
    for case in shared:
        same = ours[case] == theirs[case]
        before, after = (found[case] for found in arrays)
        distance = float(abs(before - after).max() / abs(before).max())
        allowed = same or (not case.endswith("/eager") and distance <= TOLERANCE)
        failures += not allowed
        print(f"{case:40} {'same bits' if same else f'{distance:.2e}'}{'' if allowed else '  DIFFERS'}")
    print(f"{len(shared)} cases compared, {failures} differ")
    return failures


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("path", type=Path)
    recording.add_argument("--only", default="", help="cases whose name holds this")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.path, args.only)
    else:
        sys.exit(compare(args.old, args.new) > 0)


if __name__ == "__main__":
    main()
