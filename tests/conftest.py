"""Fixtures: a tiny teacher on disk, with a tiny feature network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder with an untrained UNet of 8x8 grey images."""
    from modiff.lit.modules.teacher import LitTeacher

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    LitTeacher(TINY_UNET, {"num_train_timesteps": 100}).export(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained feature network with 4 features."""
    from modiff.metrics.features import FeatureClassifier

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "tiny.safetensors"
    FeatureClassifier(width=4, num_features=4, name="tiny-features").save(path)
    return path


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A test that leaves gradients off would break whichever test the process runs next."""
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "the test left gradients turned off"
