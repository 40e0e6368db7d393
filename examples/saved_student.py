"""A student, saved as packed integers and loaded again: the same outputs, bit for bit."""

import tempfile
from pathlib import Path

import torch
from diffusers import DDIMScheduler

import modiff
from modiff.teachers.sampling.loop import sample
from modiff.teachers.zoo import TeacherSpec, load_teacher


def draw(student: torch.nn.Module, noise: torch.Tensor) -> torch.Tensor:
    """Images from the given noise."""
    with modiff.trajectory(student):
        return sample(student, scheduler, noise, steps=5)


teacher = load_teacher(TeacherSpec("mnist"))
scheduler = DDIMScheduler.from_config(teacher.scheduler_config)
noise = torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
full_size = sum(p.numel() * p.element_size() for p in teacher.denoiser.parameters())

student = modiff.quantize(teacher.denoiser, modiff.QuantConfig.preset("w4a6-modiff"))
images = draw(student, noise)

with tempfile.TemporaryDirectory() as folder:
    modiff.save(student, folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"saved {size / 2**20:.2f} MiB; the teacher has {full_size / 2**20:.2f} MiB")

    # In another process: any denoiser of the same architecture; its weights are replaced.
    denoiser = load_teacher(TeacherSpec("mnist")).denoiser
    loaded = modiff.load(folder, denoiser)

print("same images bit for bit:", torch.equal(draw(loaded, noise), images))
