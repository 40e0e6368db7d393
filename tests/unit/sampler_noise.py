"""Noise of the tests of samplers: where a trajectory starts, and what its steps add."""

import torch

SHAPE = (2, 1, 8, 8)


def start_noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def step_noise(i: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))
