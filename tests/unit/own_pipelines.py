"""A pipeline of one's own: nothing of diffusers but the denoiser and the scheduler."""

import copy

import pipelines
import torch


class OwnPipeline:
    """Guidance in two calls, up to a step, by any denoiser; no diffusers in it."""

    def __init__(self, unet, scheduler, calls=2, name="unet"):
        self.name = name
        self.parts = {name: unet, "scheduler": scheduler, "tokenizer": None}
        self.calls = calls

    @property
    def components(self):
        return dict(self.parts)

    def __call__(self, guide_until=9):
        """Draw."""
        scheduler = copy.deepcopy(self.parts["scheduler"])  # pipelines do
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(scheduler.timesteps):
            calls = self.calls if i < guide_until else 1
            outputs = [self.parts[self.name](x * (1 + 0.1 * j), t).sample for j in range(calls)]
            x = scheduler.step(sum(outputs) / calls, t, x).prev_sample
        return x


def own(**options):
    pipe, _ = pipelines.build(pipelines.ddim)
    return OwnPipeline(pipe.unet, pipe.scheduler, **options)
