"""Images per second and bytes between ranks, at one and two processes on this machine's CPU.

python benchmarks/cluster.py --images 64 128
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def loopback_bytes() -> int:
    """Bytes that processes of this machine have sent each other."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def run(folder: Path, ranks: int, images: int, steps: int, batch: int) -> dict[str, float]:
    """One evaluation; every rank has one thread."""
    out = folder / f"{ranks}-{images}"
    command = [sys.executable, "-m", "modiff.lit.cli.main", "evaluate"]
    command += ["--config", str(ROOT / "recipes/mnist/w8a4_modiff.yaml"), "--output", str(out), "--wandb", "disabled"]
    command += ["--num_images", str(images), "--model.steps", str(steps), "--data.batch_size", str(batch)]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--error_images", "0"]
    command += ["--timing_rounds", "0", *(["--trainer.strategy", "ddp"] if ranks > 1 else [])]
    before = loopback_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    sent = loopback_bytes() - before
    status = json.loads((out / "status.json").read_text())
    return {"ranks": ranks, "images": images, "images_per_s": status["images_per_s"], "loopback_bytes": sent}


def main() -> None:
    """Print a line for each run, then what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    few, many = options.images
    with tempfile.TemporaryDirectory(prefix="modiff-cluster-") as folder:
        found = []
        for ranks, images in ((1, many), (2, many), (2, few)):
            found.append(run(Path(folder), ranks, images, options.steps, options.batch))
            print(json.dumps(found[-1]), flush=True)
    one, two, less = found
    speedup = two["images_per_s"] / one["images_per_s"]
    each = (two["loopback_bytes"] - less["loopback_bytes"]) / (many - few)
    print(f"speed-up of 2 processes: {speedup:.2f}; bytes for 1,000 images: {1000 * each:,.0f}; ", end="")
    print(f"bytes however many there are: {two['loopback_bytes'] - many * each:,.0f}")


if __name__ == "__main__":
    main()
