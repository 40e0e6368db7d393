"""Small models, inputs and students for the tests of the core."""

import pytest
import torch
from torch import nn

import modiff
from modiff.operators.modulated import ModulatedOperator
from modiff.trajectory.session import trajectory


class Denoiser(nn.Module):
    """Two convolutions, a norm and a Linear that adds the timestep; 6 operators' worth of structure in 300 weights."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(4, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1, bias=False)

    def forward(self, x, t):
        h = self.conv_in(x) + self.time(t)[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.norm(h)))


def denoiser(seed=0):
    torch.manual_seed(seed)
    return Denoiser().eval().requires_grad_(False)


def drift(shape, evaluations, seed=0, dtype=torch.float32, step=0.1):
    """Inputs that change a little from one evaluation to the next, as along a trajectory."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = []
    for _ in range(evaluations):
        inputs.append(x.to(dtype))
        x = x + step * torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs


def noise(evaluations, batch=2, seed=0, dtype=torch.float32):
    """Arguments of ``Denoiser.forward`` for each evaluation."""
    xs = drift((batch, 3, 8, 8), evaluations, seed, dtype)
    return list(zip(xs, drift((batch, 4), evaluations, seed + 1, dtype), strict=True))


def config(preset="w8a4-modiff-paper", **modulation):
    base = modiff.QuantConfig.preset(preset)
    if not modulation:
        return base
    return modiff.QuantConfig(base.weight, base.activation, modiff.Modulation(**modulation))


def student(preset="w8a4-modiff-paper", seed=0, **modulation):
    return modiff.quantize(denoiser(seed), config(preset, **modulation))


def run(model, inputs):
    """Outputs of one trajectory, and its counts."""
    with trajectory(model) as counts:
        outputs = [model(*args) for args in inputs]
    return outputs, counts


def modulated(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ModulatedOperator)}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.layer(self.attention(x, x, x, need_weights=False)[0]))


def tiny_unet(**changes):
    """An untrained UNet of 8x8 grey images; ``changes`` are other arguments of its class."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DModel(**{**arguments, **changes}).eval().requires_grad_(False)
