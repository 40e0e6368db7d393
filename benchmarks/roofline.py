"""An estimate of what int8 with modulation can win over compiled bf16 on a GPU: arithmetic and bytes, no measurement.

``python benchmarks/roofline.py`` writes the table of ``docs/kernels.md`` between its marks. It counts the
multiply-accumulates, inputs and outputs of every operator on meta tensors, and divides by the rates below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modiff.teachers.architectures import ARCHITECTURES, random_denoiser

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
# bf16 products in TFLOP/s, int8 over bf16 in library products, memory in TB/s, and what is hoped for at most.
GPUS = {
    "H100": (800.0, 1.52, 3.0, 1.35),
    "A100": (250.0, 1.74, 1.5, 1.4),
    "RTX 5090": (210.0, 2.95, 1.6, 2.0),
}
REACHED = 0.6
"""Share of these rates that products of a denoiser reach, in both precisions; large matrix products reach all of it."""
REST = 8.0
"""Bytes per operator input that the rest of the network moves in both: norm (read twice, written), half an addition."""
WAYS = {"range, then codes": 11.0, "scale known": 7.0, "fused into the norm": 3.0}
"""Bytes per input element that modulation adds; ô adds 2 per output, which is read before it is written."""


@dataclass
class Counts:
    """Totals of a denoiser's operators in one evaluation of one image.

    Args:
        macs: Multiply-accumulates of operators whose channels are multiples of 16.
        inputs: Elements that they read.
        outputs: Elements that they write.
        others: Multiply-accumulates of the other operators.
    """

    macs: float = 0
    inputs: float = 0
    outputs: float = 0
    others: float = 0


def count(model: nn.Module, *arguments: Tensor) -> Counts:
    """Run a denoiser on meta tensors."""
    found, seen = Counts(), [*arguments]

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        macs = output.numel() / weight.shape[0] * weight.numel()
        if any(channels % 16 for channels in weight.shape[:2]):
            found.others += macs
            return
        found.macs += macs
        if not any(args[0] is other for other in seen):  # operators that read the same tensor share codes and â
            found.inputs += args[0].numel()
            seen.append(args[0])
        found.outputs += output.numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(note)
    model(*arguments)
    return found


def speedup(counts: Counts, gpu: str, extra: float) -> float:
    """Time of compiled bf16 over that of W8A8 modulated."""
    tflops, ratio, bandwidth, _ = GPUS[gpu]
    tflops *= REACHED
    products = 2 * counts.macs / tflops / 1e12
    same = 2 * counts.others / tflops / 1e12 + counts.inputs * REST / bandwidth / 1e12
    modulation = (counts.inputs * extra + 2 * counts.outputs) / bandwidth / 1e12
    return (products + same) / (products / ratio + same + modulation)


def models() -> dict[str, Callable[[], Counts]]:
    """The two of the benchmark."""

    def of(name: str, *arguments: Tensor) -> Counts:
        with torch.device("meta"):
            model = random_denoiser("", ARCHITECTURES[name]).eval()
        with torch.no_grad():
            return count(model, *arguments)

    t = torch.zeros(1, dtype=torch.long, device="meta")
    return {
        "DDPM 35.7M": lambda: of("ddpm-cifar10", torch.zeros(1, 3, 32, 32, device="meta"), t),
        "DiT-XL/2": lambda: of("dit-xl-2-256", torch.zeros(1, 4, 32, 32, device="meta"), t, t),
    }


def markdown() -> str:
    """The table."""
    head = ["model", "GPU", "GMACs in int8 per image", *WAYS, "at most"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, counted in models().items():
        counts = counted()
        for gpu, (*_, high) in GPUS.items():
            ratios = [f"{speedup(counts, gpu, extra):.2f}" for extra in WAYS.values()]
            row = [name, gpu, f"{counts.macs / 1e9:.1f}", *ratios, f"{high:g}"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page, and print it."""
    found = markdown()
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
