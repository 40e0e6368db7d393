"""Writes the comparison recipes recipes/cifar10/w*.yaml.

python benchmarks/make_cifar10_recipes.py [--output recipes/cifar10]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cifar10_table import ARMS, BITS, OTHER_GRANULARITIES, RECIPES, WEIGHTS, Row  # noqa: E402

TEACHER = "runs/cifar10/teacher_small/export"
WHAT = {
    "ptq": "plain quantization",
    "modiff": "modulated",
    "modiff_no_compensation": "modulated without error compensation (the ablation)",
}


def rows() -> list[Row]:
    """One row, at 100 steps and seed 0, for each recipe."""
    found = [Row("small", w, a, arm, "sample", None, 100, 0) for w in WEIGHTS for a in BITS for arm in ARMS]
    found += [Row("small", 8, a, "modiff", g, None, 100, 0) for g in OTHER_GRANULARITIES for a in (4, 3)]
    return found


def recipe(row: Row) -> str:
    """The text of a recipe."""
    published = "none published" if row.paper_fid is None else f"{row.paper_fid:g} (35.7M teacher, 50,000 images)"
    names = {"sample": "image", "tensor": "batch", "channel": "channel", "sample_channel": "image and channel"}
    scale = names[row.granularity]
    bits = f"W{row.weight_bits}A{row.activation_bits}"
    return f"""# CIFAR-10, {bits}, {WHAT[row.arm]}, one activation scale per {scale}.
#   modiff evaluate --config {RECIPES}/{row.name}.yaml \\
#       --model.features cifar10_resnet56.pt --model.reference runs/cifar10/reference.safetensors
# Protocol: DDIM, 100 quadratic steps; x_0 is not clipped (clip_sample: false in the teacher's scheduler).
# Paper's FID: {published}. A distance in other features is not FID: do not compare the two.
seed: 0
num_images: 2048
model:
  teacher:
    path: {TEACHER}   # modiff train --config {RECIPES}/teacher_small.yaml
{quantization(row)}
{weights(row)}  scheduler: ddim_quadratic
  steps: 100
  features: null            # network and reference statistics on the command line, see above
  reference: null
data:
  batch_size: 256           # image i depends on the seed, on i and on the batch size only
"""


def weights(row: Row) -> str:
    """How the weights are found, where not by rounding to nearest."""
    if row.weight_method == "nearest":
        return ""
    return f"""  calibration:
    method: {row.weight_method}            # on the student's own trajectories of 16 images of noise; once, then kept
"""


def quantization(row: Row) -> str:
    """The preset, or where there is none for it, the same written out."""
    assert row.activation_bits is not None
    if row.arm != "modiff_no_compensation" and row.granularity == "sample":
        found = "rounded to nearest, per channel" if row.weight_method == "nearest" else "per channel, calibrated"
        return f"  preset: w{row.weight_bits}a{row.activation_bits}-{row.arm}-paper   # weights: {found}"
    compensation = "" if row.arm == "modiff" else "\n      error_compensation: false"
    modulation = "    modulation:" + (compensation or " {}")
    preset = f"w{row.weight_bits}a{row.activation_bits}-modiff-paper"
    other = "" if row.granularity == "sample" else "; another granularity"
    return f"""  config:                   # the preset {preset}, written out{other}
    weight:
      bits: {row.weight_bits}
      granularity: channel
    activation:
      bits: {row.activation_bits}
      granularity: {row.granularity}
      symmetric: {str(row.activation_bits >= 6).lower()}
{modulation}"""


def main() -> None:
    """Write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / RECIPES)
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows():
        (folder / f"{row.name}.yaml").write_text(recipe(row))
    print(f"{len(rows())} recipes in {folder}.")


if __name__ == "__main__":
    main()
