"""Leads for 4-bit weights that were tried: a low-rank branch in 8 bits, and biases that follow the trajectory.

    python benchmarks/weight_leads.py [--seeds 0 1 2] [--num_images 16]

Rounding to nearest with the best known preset (W4A32) on the packaged teacher, and on top of it: the best rank-r
approximation of what rounding lost, or of the weight before rounding (SVDQuant), its factors in 8 bits; and for every
operator, output channel and bucket of evaluations a bias that takes away the mean of the error, measured on the
full-precision trajectories of 16 other images. Relative L2 to the teacher's images, mean and spread over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import modiff
from modiff.metrics.pairwise import relative_l2
from modiff.operators.quantized import QuantizedOperator
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

STEPS, CALIBRATION_SEED, CALIBRATION_IMAGES = 50, 1000, 16
Weights = dict[str, Tensor]


def rounded(model: nn.Module) -> Weights:
    """The weights of every operator after rounding to nearest, by name."""
    student = modiff.quantize(copy.deepcopy(model), modiff.QuantConfig.preset("w4a32-modiff"))
    found = {name: op for name, op in student.named_modules() if isinstance(op, QuantizedOperator)}
    return {name: op.quantized_weight().detach().clone() for name, op in found.items()}


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """A copy with these weights."""
    out = copy.deepcopy(model)
    for name, weight in weights.items():
        out.get_submodule(name).weight.data.copy_(weight)
    return out


def in_8_bits(factor: Tensor) -> Tensor:
    """Symmetric codes, a scale for each row."""
    scale = factor.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
    return (factor / scale).round().clamp(-127, 127) * scale


def low_rank(weight: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, with its factors in 8 bits."""
    u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * v[:rank]
    return (in_8_bits(left) @ in_8_bits(right)).view_as(weight)


def after_rounding(model: nn.Module, rank: int) -> Weights:
    """Codes of the weight, and a branch for what they lost."""
    original = {name: model.get_submodule(name).weight.data for name in rounded(model)}
    return {name: w + low_rank(original[name] - w, rank) for name, w in rounded(model).items()}


def before_rounding(model: nn.Module, rank: int) -> Weights:
    """A branch for the weight, and codes of the rest."""
    branches = {name: low_rank(model.get_submodule(name).weight.data, rank) for name in rounded(model)}
    rest = with_weights(model, {n: model.get_submodule(n).weight.data - b for n, b in branches.items()})
    return {name: branches[name] + w for name, w in rounded(rest).items()}


def work(weights: Weights, rank: int) -> float:
    """Multiply-accumulates of the branches over those of the operators, for each output position alike."""
    flat = [w.flatten(1).shape for w in weights.values()]
    return sum(rank * (out + into) for out, into in flat) / sum(out * into for out, into in flat)


class Biases:
    """The mean of each output channel's error, by bucket of evaluations."""

    def __init__(self, buckets: int) -> None:
        self.buckets, self.evaluation = buckets, -1
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], int] = {}

    def count(self, *_: Any) -> None:
        """Before an evaluation."""
        self.evaluation = (self.evaluation + 1) % STEPS

    @property
    def bucket(self) -> int:
        """Of this evaluation."""
        return self.evaluation * self.buckets // STEPS

    def measure(self, teacher: nn.Module, weights: Weights, run: Callable[[nn.Module], Tensor]) -> None:
        """Run the teacher, and add up what its inputs would lose to the rounded weights."""
        model = copy.deepcopy(teacher)
        model.register_forward_pre_hook(self.count)
        for name, weight in weights.items():
            operator = model.get_submodule(name)
            lost = copy.deepcopy(operator)
            lost.weight.data, lost.bias = operator.weight.data - weight, None
            operator.register_forward_hook(self._adder(name, lost))
        run(model)
        self.evaluation = -1

    def _adder(self, name: str, lost: nn.Module) -> Callable[..., None]:
        def add(_: nn.Module, inputs: Any, output: Tensor) -> None:
            error, key = lost(*inputs), (name, self.bucket)
            summed = error.sum(dim=[d for d in range(error.ndim) if d != (1 if error.ndim == 4 else error.ndim - 1)])
            self.sums[key] = self.sums.get(key, torch.zeros(())) + summed
            self.counts[key] = self.counts.get(key, 0) + error.numel() // len(summed)

        return add

    def applied(self, model: nn.Module, names: list[str]) -> nn.Module:
        """The model with the mean error added to each output."""

        def shift(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                mean = self.sums[name, self.bucket] / self.counts[name, self.bucket]
                return output + (mean[:, None, None] if output.ndim == 4 else mean)

            return hook

        model.register_forward_pre_hook(self.count)
        for name in names:
            model.get_submodule(name).register_forward_hook(shift(name))
        return model


@torch.no_grad()
def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 10])
    args = parser.parse_args()
    teacher = load_teacher(TeacherSpec("mnist"))
    denoiser, scheduler = teacher.denoiser, make_scheduler("ddim", teacher.scheduler_config)

    def draw(model: nn.Module, seed: int, count: int) -> Tensor:
        return sample(model, scheduler, indexed_noise(seed, range(count), teacher.sample_shape), STEPS)

    targets = {seed: draw(denoiser, seed, args.num_images) for seed in args.seeds}

    def report(label: str, model: nn.Module, extra: float = 0.0) -> None:
        found = [relative_l2(draw(model, s, args.num_images), targets[s]).mean().item() for s in args.seeds]
        spread = max(found) - min(found)
        print(f"| {label} | {statistics.fmean(found):.3f} ({spread:.3f}) | {100 * extra:.1f} % |", flush=True)

    nearest = rounded(denoiser)
    print("| weights | relative L2 (spread) | more multiply-accumulates |\n|---|---|---|")
    report("nearest", with_weights(denoiser, nearest))
    for rank in args.ranks:
        extra = work(nearest, rank)
        report(f"branch of rank {rank} after rounding", with_weights(denoiser, after_rounding(denoiser, rank)), extra)
        report(f"branch of rank {rank} before rounding", with_weights(denoiser, before_rounding(denoiser, rank)), extra)
    for buckets in args.buckets:
        biases = Biases(buckets)
        biases.measure(denoiser, nearest, lambda model: draw(model, CALIBRATION_SEED, CALIBRATION_IMAGES))
        report(f"biases, {buckets} buckets", biases.applied(with_weights(denoiser, nearest), list(nearest)))


if __name__ == "__main__":
    main()
