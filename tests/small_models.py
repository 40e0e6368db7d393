"""Small models, inputs and students for the tests of the core."""

import torch
from torch import nn

import modiff
from modiff.layers.modulated import ModulatedOperator
from modiff.layers.state import trajectory


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


def config(preset="w8a4-modiff", **modulation):
    base = modiff.QuantConfig.preset(preset)
    if not modulation:
        return base
    return modiff.QuantConfig(base.weight, base.activation, modiff.Modulation(**modulation))


def student(preset="w8a4-modiff", seed=0, **modulation):
    return modiff.quantize(denoiser(seed), config(preset, **modulation))


def run(model, inputs):
    """Outputs of one trajectory, and its counts."""
    with trajectory(model) as counts:
        outputs = [model(*args) for args in inputs]
    return outputs, counts


def modulated(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, ModulatedOperator)}
