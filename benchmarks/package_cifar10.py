"""Packs a CIFAR-10 teacher that `modiff train` left: fp16 weights, and a model card measured on those very weights.

    modiff statistics --features $FEATURES --data.path $DATA --data.channels 3 --output $REFERENCE
    modiff statistics --features $FEATURES --data.path $DATA --data.channels 3 --split test --output $TEST
    python benchmarks/package_cifar10.py --features $FEATURES --reference $REFERENCE --test_reference $TEST \
        --output modiff/teachers/assets/cifar10-small

It writes the pipeline, `loss.png`, `samples.png` and `README.md`; nothing where the weights are larger than --mib. The
distance is that of --num_images images to the training images, beside that of the test images to them: its floor.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

CARD = """# Model card: `{title}`

An unconditional denoiser of 32x32 colour images, a teacher for measuring quantization.

| | |
|---|---|
| network | `{network_class}`, {parameters:,} parameters, float16, {mib:.1f} MiB; computed in float32 |
| predicts | the noise, {train_steps} training steps, {betas} betas from {beta_start:g} to {beta_end:g} |
| data | CIFAR-10 (Krizhevsky 2009), 50,000 training images, mirrored at random: {flips} |
| recipe | `modiff train --config recipes/cifar10/{recipe}.yaml` |
| training | {steps:,} steps of {batch} images ({seen:,} in all), AdamW, rate {rate:g} {decay_of_rate}, {precision} |
| weights | exponential moving average, decay {decay:g} |
| machine | {machine} (of this card's figures) |
| loss | noise prediction MSE on test images, averaged weights: {loss} |

![Loss](loss.png)

Samples, {sampler}, seed 0, images 0 to {last}, not selected:

![Samples](samples.png)

## Distance to real images

| Fréchet distance in the {num_features} features of `{network}`, to {reference_images} training images | |
|---|---|
| this teacher, {num_images:,} images, {sampler}, seed 0 | **{distance:.3f}** |
| {test_images} test images: the floor | {floor:.3f} |

It is not FID, and compares with no other network's or image count's (small counts are biased upwards).

## Limits

A teacher for measuring quantization, not a good generator. It knows nothing but CIFAR-10.
"""


def main(argv: list[str] | None = None) -> int:
    """Pack, measure, write the card."""
    args = make_parser().parse_args(argv)
    if args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it, or give another --output.")
    work = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        export = args.run / "export"
        if args.checkpoint:
            export = work / "from_checkpoint"
            export_checkpoint(args.run, export)
        facts = pack(export, work, args.mib)
        shutil.rmtree(work / "from_checkpoint", ignore_errors=True)
        config = yaml.safe_load((args.run / "config.yaml").read_text())
        facts |= training_facts(config, loss_curve(args.run, work / "loss.png"))
        facts |= measure(work, args)
        (work / "README.md").write_text(CARD.format(title=args.output.name, recipe=args.run.name, **facts))
        work.rename(args.output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{args.output}: {facts['mib']:.1f} MiB; distance {facts['distance']:.3f}, floor {facts['floor']:.3f}.")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10/teacher_small"), help="Of `modiff train`.")
    parser.add_argument("--features", required=True, help="Feature network, such as cifar10_resnet56.pt.")
    parser.add_argument("--reference", required=True, help="Its statistics of the training images.")
    parser.add_argument("--test_reference", required=True, help="Its statistics of the test images.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--mib", type=float, default=12.0, help="Largest file of weights.")
    parser.add_argument("--checkpoint", action="store_true", help="Pack last.ckpt of a training that goes on.")
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--steps", type=int, default=100, help="Quadratic DDIM steps.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1.")
    return parser


def export_checkpoint(run: Path, folder: Path) -> None:
    """Write the pipeline of the averaged weights in ``last.ckpt``, as the end of a training writes it."""
    from diffusers import DDIMPipeline, DDIMScheduler

    from modiff.teachers.patched import make_denoiser

    arguments = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    saved = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
    denoiser = make_denoiser(arguments["denoiser"])
    denoiser.load_state_dict({k.removeprefix("denoiser."): v for k, v in saved.items() if k.startswith("denoiser.")})
    DDIMPipeline(unet=denoiser, scheduler=DDIMScheduler(**arguments["schedule"])).save_pretrained(folder)


def pack(export: Path, folder: Path, limit: float) -> dict[str, Any]:
    """The pipeline with float16 weights.

    Raises:
        SystemExit: The weights are too large.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    from modiff.teachers.zoo import TeacherSpec, load_teacher

    teacher = load_teacher(TeacherSpec(path=str(export)))
    scheduler = DDIMScheduler.from_config(teacher.scheduler_config)
    pipeline = DDIMPipeline(unet=teacher.denoiser.half(), scheduler=scheduler)
    pipeline.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 2**20
    if size > limit:
        raise SystemExit(f"The weights take {size:.1f} MiB in float16; allowed are {limit:g} (--mib).")
    return {
        "mib": size,
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "network_class": type(pipeline.unet).__name__,
    }


def loss_curve(run: Path, path: Path) -> dict[str, dict[int, float]]:
    """Draw training and test loss; returns both by step. A later start of the training overrides an earlier one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[int, float]] = {"train/loss": {}, "val/loss": {}}
    for file in sorted(run.glob("logs/version_*/metrics.csv"), key=lambda f: int(f.parent.name.split("_")[1])):
        for row in csv.DictReader(file.read_text().splitlines()):
            for name, curve in curves.items():
                if row.get(name):
                    curve[int(row["step"]) + 1] = float(row[name])
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        steps = sorted(curve)
        axes.plot(steps, [curve[s] for s in steps], label=name, marker="o" if name == "val/loss" else None, ms=3)
    axes.set(xlabel="optimizer step", ylabel="noise prediction MSE", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    return curves


def training_facts(config: dict[str, Any], curves: dict[str, dict[int, float]]) -> dict[str, Any]:
    """What the recipe says, and the last losses."""
    model, trainer = config["model"]["init_args"], config["trainer"]
    schedule, test = model["schedule"], sorted(curves["val/loss"].items())[-3:]
    steps = max((step for curve in curves.values() for step in curve), default=0)
    return {
        "train_steps": schedule["num_train_timesteps"],
        "betas": schedule["beta_schedule"],
        "beta_start": schedule["beta_start"],
        "beta_end": schedule["beta_end"],
        "flips": "yes" if config["data"]["horizontal_flips"] else "no",
        "steps": steps,
        "seen": steps * config["data"]["batch_size"],
        "batch": config["data"]["batch_size"],
        "rate": model["learning_rate"],
        "decay_of_rate": "that stays" if model.get("decay") == "none" else "falling as a cosine",
        "precision": trainer["precision"],
        "decay": math.nan if config["ema_decay"] is None else config["ema_decay"],
        "loss": ", ".join(f"{loss:.4f} (step {step:,})" for step, loss in test) or "not measured",
    }


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Draw images with the packed weights: a grid, and their distance to the training images."""
    from modiff.lit.commands.statistics import pick_device
    from modiff.lit.report.image_grids import image_grid, save_picture
    from modiff.metrics.features import load_feature_network
    from modiff.metrics.fidelity import ImageFidelity
    from modiff.metrics.statistics import FeatureStatistics, frechet_distance

    device = pick_device(args.device)
    reference, test = (FeatureStatistics.load(path) for path in (args.reference, args.test_reference))
    metric = ImageFidelity(load_feature_network(args.features), reference, max_kept=4).to(device)
    test.check(metric.network_name, metric.num_features)
    shown = []
    for images in draw(folder, device, args):
        metric.update(images, "teacher")
        if sum(map(len, shown)) < 48:
            shown.append(images.cpu())
    grid = torch.cat(shown)[:48]
    save_picture(image_grid(grid, columns=12), folder / "samples.png")
    return {
        "distance": frechet_distance(metric.statistics("teacher"), reference),
        "floor": frechet_distance(test, reference),
        "num_images": args.num_images,
        "last": len(grid) - 1,
        "reference_images": reference.num_images,
        "test_images": test.num_images,
        "num_features": metric.num_features,
        "network": metric.network_name,
        "sampler": f"DDIM {args.steps} quadratic steps",
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, torch {torch.__version__}",
    }


def draw(folder: Path, device: torch.device, args: argparse.Namespace) -> Any:
    """Batches of images ``[B, C, H, W]`` in [0, 1], by index as `modiff sample` draws them."""
    from modiff.teachers.sampling.loop import sample
    from modiff.teachers.sampling.noise import indexed_noise
    from modiff.teachers.sampling.schedulers import make_scheduler
    from modiff.teachers.zoo import TeacherSpec, load_teacher

    teacher = load_teacher(TeacherSpec(path=str(folder)))
    denoiser = teacher.denoiser.to(device)
    scheduler = make_scheduler("ddim_quadratic", teacher.scheduler_config)
    for first in range(0, args.num_images, args.batch_size):
        indices = range(first, min(first + args.batch_size, args.num_images))
        noise = indexed_noise(0, indices, teacher.sample_shape).to(device)
        images: Tensor = sample(denoiser, scheduler, noise, args.steps)
        yield (images / 2 + 0.5).clamp(0, 1)


if __name__ == "__main__":
    raise SystemExit(main())
