"""A denoiser and a sampling loop of your own: nothing but PyTorch."""

import torch
from torch import Tensor, nn

import modiff


class Denoiser(nn.Module):
    """Predicts the noise in x_t, given t in 0..1; put your own here."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.conv_mid = nn.Conv2d(32, 32, 3, padding=1)
        self.conv_out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``x`` [B, 3, H, W], ``t`` [B, 1]."""
        h = self.conv_in(x) + self.time(t)[:, :, None, None]
        return self.conv_out(nn.functional.silu(self.conv_mid(nn.functional.silu(h))))


def sample(model: nn.Module, noise: Tensor, steps: int = 20) -> Tensor:
    """DDIM with a cosine schedule."""
    alphas = torch.cos(torch.linspace(0.98, 0.0, steps + 1) * torch.pi / 2) ** 2
    x = noise
    for a, a_next, t in zip(alphas[:-1], alphas[1:], torch.linspace(0.98, 0.0, steps + 1), strict=False):
        epsilon = model(x, t.expand(len(x), 1))
        clean = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        x = a_next.sqrt() * clean.clamp(-1, 1) + (1 - a_next).sqrt() * epsilon
    return x


torch.manual_seed(0)
model = Denoiser().eval().requires_grad_(False)
noise = torch.randn(4, 3, 16, 16)
teacher_images = sample(model, noise)

config = modiff.QuantConfig(
    weight=modiff.QuantSpec(bits=8, granularity="channel"),
    activation=modiff.QuantSpec(bits=4, granularity="sample"),
    modulation=modiff.Modulation(),
    rules=[modiff.Rule("conv_out", activation=modiff.QuantSpec(bits=8, granularity="sample"))],
)
student = modiff.quantize(model, config)
print(modiff.describe(student))

with modiff.trajectory(student) as run:  # one batch, from noise to image: all state lives in here
    student_images = sample(student, noise)
error = (student_images - teacher_images).norm() / teacher_images.norm()
print(f"{run.quantized} of {run.total} evaluations quantized; relative error {error:.4f}")
print(modiff.cost(student, noise, torch.ones(4, 1), evaluations=run.total))
