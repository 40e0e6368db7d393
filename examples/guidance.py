"""Classifier-free guidance: in one batch of 2B rows, and in two calls per step that keep a state each."""

import torch
from torch import Tensor, nn

import modiff


class Denoiser(nn.Module):
    """Predicts the noise in x, given an embedding of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.prompt = nn.Linear(8, 16)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """``x`` [B, 3, H, W], ``prompt`` [B, 8]."""
        h = self.conv_in(x) + self.prompt(prompt)[:, :, None, None]
        return self.conv_out(nn.functional.silu(h))


torch.manual_seed(0)
model = Denoiser().eval().requires_grad_(False)
noise, prompt, empty = torch.randn(2, 3, 16, 16), torch.randn(2, 8), torch.zeros(2, 8)
SCALE, STEPS = 3.0, 10


def guided(x: Tensor, unconditional: Tensor, conditional: Tensor) -> Tensor:
    """One step of a sampler, kept simple."""
    return x - 0.1 * (unconditional + SCALE * (conditional - unconditional))


student = modiff.quantize(model, modiff.QuantConfig.preset("w8a6-modiff"))

# One batch of 2B rows needs nothing special.
x, both = noise, torch.cat([empty, prompt])
with modiff.trajectory(student) as one_batch:
    for _ in range(STEPS):
        x = guided(x, *student(torch.cat([x, x]), both).chunk(2))
print(f"one batch: {one_batch.quantized} of {one_batch.total} evaluations quantized")

# In two calls, each names its state; the unconditional one may end early.
y = noise
with modiff.trajectory(student) as two_calls:
    for _ in range(STEPS):
        with two_calls.context("uncond"):
            unconditional = student(y, empty)
        with two_calls.context("cond"):
            conditional = student(y, prompt)
        y = guided(y, unconditional, conditional)
for context in two_calls.contexts.values():
    print(f"two calls, {context.name}: {context.quantized} of {context.total} evaluations quantized")
print(f"relative difference of the images: {(x - y).norm() / x.norm():.1e}")

fixed = [row.name for row in modiff.describe(student) if row.constant]
print("computed once, because the input is fixed:", ", ".join(fixed))

# Pipelines of diffusers that name their calls (cache_context) need nothing; for others, in the order of their calls:
# modiff.quantize_pipeline(pipe, "w8a6-modiff", contexts=("uncond", "cond"))
