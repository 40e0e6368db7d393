"""A denoiser with everything that a checkpoint must hold, saved and loaded."""

import pytest
import torch
from torch import nn

import modiff
from modiff.config.quant import QuantConfig
from modiff.errors import CheckpointError
from modiff.student.tensors import slots


class Denoiser(nn.Module):
    """Convolutions (one grouped, one shared), Linear, norms, tied weights, and a buffer that no state dict holds."""

    def __init__(self, width: int = 8, seed: int = 0, heads: int = 2) -> None:
        super().__init__()
        self.config = {"width": width, "heads": heads, "_name_or_path": f"seed {seed}", "sample_size": 6}
        torch.manual_seed(seed)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, groups=2)] * 2)
        self.norm = nn.GroupNorm(2, width)
        self.time = nn.Linear(1, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.embedding = nn.Embedding(width, width)
        self.embedding.weight = self.tied.weight
        self.conv_out = nn.Conv2d(width, 3, 1)
        self.register_buffer("shift", torch.randn(width), persistent=False)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x) + self.time(t[:, None].to(x.dtype))[:, :, None, None] + self.shift[:, None, None]
        for block in self.blocks:
            h = h + block(self.norm(h).tanh())
        h = h + self.tied(h.mean(dim=(2, 3)) + self.embedding.weight[0])[:, :, None, None]
        return self.conv_out(h)


def sample(model: nn.Module, evaluations: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A trajectory of a student or teacher."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    outputs = []

    def loop(x: torch.Tensor) -> None:
        for t in reversed(range(evaluations)):
            outputs.append(model(x, torch.full((2,), t / evaluations)))
            x = x - 0.2 * outputs[-1]

    if hasattr(model, "_modiff_state"):
        with modiff.trajectory(model):
            loop(x)
    else:
        with torch.no_grad():
            loop(x)
    return torch.stack(outputs)


def meta(width: int = 8) -> Denoiser:
    with torch.device("meta"):
        return Denoiser(width)


def saved(path, config="w4a4-modiff-paper", dtype=None, **kwargs):
    config = QuantConfig.preset(config) if isinstance(config, str) else config
    student = modiff.quantize(Denoiser(**kwargs), config)
    modiff.save(student, path, dtype=dtype)
    return student


def refuses(path, match: str, model: nn.Module | None = None) -> None:
    """Loading raises, and leaves the model as it was, on a full and on a meta model."""
    for target in [model] if model is not None else [Denoiser(seed=2), meta()]:
        before = {slot.name: slot.tensor for slot in slots(target)}
        modules = list(target.modules())
        with pytest.raises(CheckpointError, match=match):
            modiff.load(path, target)
        assert all(slot.tensor is before[slot.name] for slot in slots(target))
        assert list(target.modules()) == modules
        assert not hasattr(target, "_modiff_state")
