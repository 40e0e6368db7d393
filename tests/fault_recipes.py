"""Recipes of tiny models for the runs that are disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lightning.pytorch import Callback

EVALUATE = """
seed: 0
num_images: 24
wandb: disabled
error_images: 0
timing_rounds: 0
sample_count: 4
save_images: true
model:
  teacher: {{path: {teacher}}}
  preset: w{bits}a4-modiff
  scheduler: ddim
  steps: 6
  eta: 0.5
  features: {features}
data: {{batch_size: 4}}
trainer: {{accelerator: cpu, enable_progress_bar: false}}
"""
QUANTIZE = """
seed: 0
wandb: disabled
model:
  teacher: {{path: {teacher}}}
  preset: w3a4-modiff
  scheduler: ddim
  steps: 6
  calibration: {{method: gptq, num_images: 6, images_per_batch: 3, positions: 200, samples: 8, tuning_iterations: 20,
    stage_size: 2}}
trainer: {{accelerator: cpu, enable_progress_bar: false}}
"""
TRAIN = """
seed: 0
wandb: disabled
model:
  class_path: modiff.lit.modules.teacher.LitTeacher
  init_args:
    denoiser: {{sample_size: 8, in_channels: 1, out_channels: 1, layers_per_block: 1, block_out_channels: [8],
      down_block_types: [DownBlock2D], up_block_types: [UpBlock2D], norm_num_groups: 2, attention_head_dim: 4,
      dropout: 0.1}}
    schedule: {{num_train_timesteps: 20}}
    warmup_steps: 5
    sample_steps: 2
data: {{path: {data}, image_size: 8, batch_size: 4, horizontal_flips: true}}
ema_decay: 0.9
sample_images: 0
checkpoint_every: 20
trainer: {{max_epochs: 14, val_check_interval: 25, check_val_every_n_epoch: null, accelerator: cpu,
  enable_progress_bar: false, limit_val_batches: 1, log_every_n_steps: 10}}
"""


def make_recipes(teacher: Path, features: Path, data: Path) -> dict[str, str]:
    """By the names that :class:`fault_cases.Bench` knows."""
    return {
        "evaluate": EVALUATE.format(teacher=teacher, features=features, bits=8),
        "other": EVALUATE.format(teacher=teacher, features=features, bits=6),
        "quantize": QUANTIZE.format(teacher=teacher),
        "train": TRAIN.format(data=data),
    }


def save_images(folder: Path, train: int = 30, test: int = 8) -> Path:
    """Random grey pictures as two parquet files."""
    import datasets
    import numpy as np
    from PIL import Image

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        rows = {"image": [Image.fromarray(picture) for picture in pixels], "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}-0.parquet"))
    return folder


class TerminateAt(Callback):
    """Sends SIGTERM to one rank as one of its training steps begins."""

    def __init__(self, steps: int, rank: int) -> None:
        self.steps, self.rank = steps, rank

    def on_train_batch_start(self, trainer, *_) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.steps, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)
