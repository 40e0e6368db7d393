"""Writes the recipes of the paper's tables and of newer models: one flat file for each row. The table is this file.

    python recipes/make_paper_rows.py            write every file again
    python recipes/make_paper_rows.py --check    exit with 1 where a file differs from its row

Published figures are those of arXiv 2506.22463 (FID, fewer is better). What the paper calls "channel-wise" dynamic
quantization ("LCQ") takes its ranges over the batch dimension, that is, per image: granularity ``sample`` here; its
"tensor-wise" ("LTQ") has one range for the whole batch: ``tensor``. Rows ``qdiffusion`` and ``qdiffusion_modiff``
calibrate weights and ranges as Q-Diffusion does, by ``model.calibration``; all others round weights to nearest, where
the paper's are rounded by AdaRound.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Protocol:
    """How the images of one table are drawn.

    Args:
        teacher: Folder of the recipes and name in the zoo.
        title: What the table is about.
        scheduler: Sampler.
        steps: Its steps.
        num_images: Images behind the published figure.
        batch_size: Samples per batch and device.
        eta: Noise of DDIM.
        guidance: Scale, None for unconditional models.
        suffix: Of the file name.
        data: Further lines of ``data``.
        notes: Comments on the protocol.
        exclude: Operators in full precision.
        features: Whether FID is measured.
        splits: Whether Q-Diffusion splits the shortcuts of this model.
    """

    teacher: str
    title: str
    scheduler: str
    steps: int
    num_images: int = 50_000
    batch_size: int = 64
    eta: float = 0.0
    guidance: float | None = None
    suffix: str = ""
    data: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    features: bool = True
    splits: bool = False


@dataclass(frozen=True)
class Row:
    """One recipe.

    Args:
        protocol: How it is drawn.
        weight: Bits of the weights.
        activation: Bits of the activations.
        method: ``modiff`` or ``ptq``; or ``qdiffusion_modiff`` or ``qdiffusion``: the same on calibrated scales.
        granularity: Of the activations.
        published: What the paper reports, in words.
    """

    protocol: Protocol
    weight: int
    activation: int
    method: str
    granularity: str
    published: str

    @property
    def calibrated(self) -> bool:
        """Whether weights and ranges are calibrated."""
        return self.method.startswith("qdiffusion")

    @property
    def modulated(self) -> bool:
        """Whether differences are quantized."""
        return self.method.endswith("modiff")

    @property
    def path(self) -> str:
        """File below the folder of recipes."""
        kind = "_tensor" if self.granularity == "tensor" and not self.calibrated else ""
        name = f"w{self.weight}a{self.activation}_{self.method}{kind}{self.protocol.suffix}.yaml"
        return f"{self.protocol.teacher}/{name}"


CIFAR = Protocol(
    "ddpm-cifar10",
    "CIFAR-10, DDPM's own UNet",
    "ddim_quadratic",
    100,
    batch_size=256,
    notes=("Published with activations in full precision: W8 4.24, W4 5.09.",),
    splits=True,
)
CIFAR_20 = Protocol("ddpm-cifar10", "CIFAR-10, 20 DDIM steps", "ddim_quadratic", 20, batch_size=256, suffix="_ddim20")
CIFAR_DPM = Protocol("ddpm-cifar10", "CIFAR-10, DPM-Solver-2", "dpm_solver_2", 20, batch_size=256, suffix="_dpm20")
CHURCHES = Protocol(
    "ldm-church",
    "LSUN-Churches, LDM-8",
    "ddim",
    200,
    notes=("Published with activations in full precision: W8 4.03.",),
)
BEDROOMS = Protocol(
    "ldm-bedroom",
    "LSUN-Bedrooms, LDM-4",
    "ddim",
    500,
    batch_size=32,
    eta=1.0,
    notes=(
        "Published with activations in full precision: W8 3.45.",
        "eta 1 is Q-Diffusion's setting for this model; the paper does not name its own.",
    ),
)
COCO = ("prompts: null           # your file of COCO-2014 captions: --data.prompts captions.txt",)
SD = Protocol(
    "sd-v1-4",
    "Stable Diffusion v1.4, COCO-2014",
    "plms",
    50,
    num_images=30_000,
    batch_size=8,
    guidance=7.5,
    data=COCO,
    notes=(
        "The paper names neither the guidance (7.5: the model's default) nor the activations' granularity of this row.",
    ),
)
DIT = Protocol(
    "dit-xl-2-256",
    "ImageNet-256, DiT-XL/2",
    "ddim",
    50,
    batch_size=32,
    guidance=1.5,
    data=("labels: null            # all 1000 classes in turn",),
    notes=(
        "The paper names neither the guidance (1.5: of DiT's own table) nor the activations' granularity of this row.",
    ),
)

# (weight bits, activation bits): FID without and with modulation; None: not published.
LCQ = {
    (8, 8): (4.21, 4.10),
    (8, 6): (4.15, 4.21),
    (8, 4): (24.09, 4.31),
    (8, 3): (143.4, 4.14),
    (8, 2): (429.6, None),
    (4, 8): (4.96, 4.95),
    (4, 6): (4.49, 5.01),
    (4, 4): (22.50, 5.10),
    (4, 3): (146.3, 4.98),
}
ON_QDIFFUSION = {
    (8, 8): (3.75, 4.10),
    (8, 6): (29.16, 4.19),
    (8, 4): (332.8, 13.41),
    (8, 3): (457.4, 90.34),
    (8, 2): (457.3, 266.7),
    (4, 8): (4.93, 5.13),
    (4, 6): (28.60, 5.62),
    (4, 4): (325.8, 13.62),
    (4, 3): (457.4, 47.35),
}
LTQ = {
    (8, 8): (4.19, 4.21),
    (8, 6): (9.93, 4.00),
    (8, 4): (306.1, 28.19),
    (8, 2): (457.3, 186.0),
    (4, 8): (5.02, 5.05),
    (4, 6): (9.96, 5.04),
    (4, 4): (294.9, 26.17),
}
LTQ_20 = {(8, 8): (6.93, 6.90), (8, 6): (20.28, 6.75), (8, 4): (297.2, 22.1)}
LTQ_DPM = {(8, 8): (3.92, 3.91), (8, 6): (10.82, 3.91), (8, 4): (299.7, 26.5)}
ON_CHURCHES = {(8, 8): (4.24, 3.85), (8, 6): (55.1, 5.43), (8, 4): (355.9, 3.97), (8, 3): (367.5, 5.40)}
ON_BEDROOMS = {(8, 8): (3.61, 3.57), (8, 6): (64.2, 3.57), (8, 4): (372, 27.9)}
ON_SD = {(8, 8): (12.15, 12.14), (8, 6): (71.4, 13.2), (8, 4): (408, 225)}
ON_DIT = {(8, 8): (54.8, 53.8), (8, 6): (200, 54.7), (8, 4): (272, 90.9)}

Table = dict[tuple[int, int], tuple[float, float | None]]


DYNAMIC = ("ptq", "modiff")
QDIFFUSION = ("qdiffusion", "qdiffusion_modiff")


def rows_of(
    protocol: Protocol, table: Table, granularity: str, note: str, methods: tuple[str, str] = DYNAMIC
) -> list[Row]:
    """Two recipes for each cell of a table: plain and modulated."""
    rows = []
    for (weight, activation), published in table.items():
        for method, value in zip(methods, published, strict=True):
            text = f"FID {value:g}" if value is not None else "no figure"
            rows.append(Row(protocol, weight, activation, method, granularity, f"{text} ({note})"))
    return rows


ROWS = [
    *rows_of(CIFAR, LCQ, "sample", "LCQ: dynamic, per image"),
    *rows_of(CIFAR, LTQ, "tensor", "LTQ: dynamic, tensor-wise"),
    *rows_of(CIFAR_20, LTQ_20, "tensor", "LTQ: dynamic, tensor-wise"),
    *rows_of(CIFAR_DPM, LTQ_DPM, "tensor", "LTQ: dynamic, tensor-wise"),
    *rows_of(CHURCHES, ON_CHURCHES, "sample", "on Q-Diffusion's calibrated activations; here dynamic, per image"),
    *rows_of(CIFAR, ON_QDIFFUSION, "tensor", "on Q-Diffusion: calibrated, tensor-wise", QDIFFUSION),
    *rows_of(CHURCHES, ON_CHURCHES, "tensor", "on Q-Diffusion: calibrated, tensor-wise", QDIFFUSION),
    *rows_of(BEDROOMS, ON_BEDROOMS, "sample", "LCQ: dynamic, per image"),
    *rows_of(SD, ON_SD, "sample", "granularity not named; here dynamic, per image"),
    *rows_of(DIT, ON_DIT, "sample", "granularity not named; here dynamic, per image"),
]

PROMPTS = ("prompts: null           # your prompts, one in a line: --data.prompts prompts.txt",)
_NEW = {"num_images": 5_000, "batch_size": 4, "data": PROMPTS, "features": False}
PIXART = Protocol(
    "pixart-sigma",
    "PixArt-Sigma, 1024 pixels",
    "dpmpp_2m",
    20,
    guidance=4.5,
    exclude=("adaln_single.*", "caption_projection.*", "proj_out"),
    **_NEW,  # type: ignore[arg-type]
)
SDXL = Protocol("sdxl", "SDXL, 1024 pixels", "euler", 50, guidance=5.0, **_NEW)  # type: ignore[arg-type]
TURBO = Protocol("sdxl-turbo", "SDXL-Turbo, 512 pixels", "euler_ancestral", 4, guidance=1.0, **_NEW)  # type: ignore[arg-type]
_FLUX = ("*embed*", "proj_out")
SCHNELL = Protocol("flux-schnell", "FLUX.1-schnell", "flow_euler_flux", 4, guidance=1.0, exclude=_FLUX, **_NEW)  # type: ignore[arg-type]
DEV = Protocol("flux-dev", "FLUX.1-dev", "flow_euler_flux", 28, guidance=3.5, exclude=_FLUX, **_NEW)  # type: ignore[arg-type]
SD3 = Protocol("sd3", "Stable Diffusion 3 medium", "flow_euler", 28, guidance=7.0, exclude=_FLUX, **_NEW)  # type: ignore[arg-type]
SANA = Protocol(
    "sana",
    "Sana, 1.6B, 1024 pixels",
    "dpmpp_2m",
    20,
    guidance=4.5,
    exclude=("time_embed.*", "caption_projection.*", "proj_out"),
    **_NEW,  # type: ignore[arg-type]
)
for _protocol in (PIXART, SDXL, TURBO, SD3, SANA, SCHNELL, DEV):
    _said = "unusable below A8, 2 to 8 steps" if _protocol is TURBO else "nothing on this model"
    ROWS += [
        Row(_protocol, 8, activation, method, "sample", _said) for activation in (8, 4) for method in ("ptq", "modiff")
    ]


# Q-Diffusion's own settings: 20 evaluations of 256 trajectories, block reconstruction, learned step sizes. It splits
# the shortcut of a skip connection in two halves, with a range each, for CIFAR-10 and Stable Diffusion (`--split` of
# its published commands, and of MoDiff's); its script for the LSUN models has no such option.
CALIBRATION = (
    "  calibration:            # takes hours at this size; was not run at it here",
    "    method: brecq",
    "    ranges: lsq",
    "    num_images: 256",
    "    images_per_batch: 32",
    "    evaluations: 20",
    "    samples: 5120",
    "    iterations: 20000",
    "    batch_size: 32",
    "    lsq_iterations: 5000",
    "    tuning_iterations: 0",
)
SPLIT = ("    split_concatenations: true    # each half of a skip connection's shortcut has ranges of its own",)
NO_SPLIT = ("# Shortcuts are not split: Q-Diffusion's and MoDiff's scripts split them for CIFAR-10 and SD only.",)
TINY = ("num_images 2", "images_per_batch 2", "iterations 2", "lsq_iterations 2")


def text_of(row: Row) -> str:
    """Content of a recipe."""
    p, modulated = row.protocol, row.modulated
    # Plain activations and residuals below 6 bits use their codes better with a zero point; see QuantConfig.preset.
    symmetric = "true" if modulated and row.activation >= 6 else "false"
    kind = "modulated" if modulated else "plain"
    span = ", range: calibrated" if row.calibrated else ""
    weights = "# Weights are rounded to nearest here, by AdaRound in the paper." if p.features else ""
    weights = "# Weights by block reconstruction, ranges learned, as in Q-Diffusion." if row.calibrated else weights
    lines = [
        "# Written by recipes/make_paper_rows.py; change the row there.",
        f"# {p.title}, W{row.weight}A{row.activation}, {kind}. Published: {row.published}.",
        *(f"# {note}" for note in p.notes),
        weights,
        *(NO_SPLIT if row.calibrated and not p.splits else ()),
        f"#   modiff evaluate --config recipes/{row.path}"
        + (" --model.reference IMAGES_OR_STATISTICS" if p.features else ""),
        "# Try it without the model: --model.teacher.tiny true --model.features null --model.steps 4 --num_images 2",
        *(f"#   --model.calibration.{field}" for field in (TINY if row.calibrated else ())),
        "seed: 0",
        f"num_images: {p.num_images}",
        "model:",
        "  teacher:",
        f"    name: {p.teacher}",
        "  config:",
        f"    weight: {{bits: {row.weight}, granularity: channel{', symmetric: false' if row.calibrated else ''}}}",
        f"    activation: {{bits: {row.activation}, granularity: {row.granularity}, symmetric: {symmetric}{span}}}",
        f"    modulation: {'{warmup: full}' if modulated else 'null'}",
    ]
    if p.exclude:
        lines += ["    rules:", *(f'      - {{pattern: "{pattern}", skip: true}}' for pattern in p.exclude)]
    lines += CALIBRATION if row.calibrated else ()
    lines += SPLIT if row.calibrated and p.splits else ()
    lines += [f"  scheduler: {p.scheduler}", f"  steps: {p.steps}"]
    lines += [f"  eta: {p.eta}"] if p.scheduler.startswith("ddim") else []
    lines += [f"  guidance: {p.guidance}"] if p.guidance is not None else []
    lines += ["  features: inception     # needs modiff[fidelity]"] if p.features else []
    lines += ["data:", f"  batch_size: {p.batch_size}", *(f"  {line}" for line in p.data)]
    return "\n".join(line for line in lines if line) + "\n"


def main(check: bool) -> int:
    """Write the files, or compare them."""
    different = []
    for row in ROWS:
        file = FOLDER / row.path
        if check:
            if not file.is_file() or file.read_text() != text_of(row):
                different.append(row.path)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text_of(row))
    print("\n".join(f"{path} differs from its row" for path in different) or f"{len(ROWS)} recipes")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
