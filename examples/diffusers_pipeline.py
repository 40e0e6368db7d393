"""A diffusers pipeline, quantized in one line: the images before and after, from the same noise."""

import torch
from diffusers import DDIMPipeline, DDIMScheduler

import modiff
from modiff.metrics.pairwise import psnr_db
from modiff.teachers.zoo import TeacherSpec, load_teacher

# Any pipeline will do: pipe = DiffusionPipeline.from_pretrained(...). This one draws digits and needs no download.
teacher = load_teacher(TeacherSpec("mnist"))
pipe = DDIMPipeline(teacher.denoiser, DDIMScheduler.from_config(teacher.scheduler_config))
pipe.set_progress_bar_config(disable=True)


def draw() -> torch.Tensor:
    """Two images, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=6, generator=generator, output_type="np").images
    return torch.as_tensor(images)


before = draw()
modiff.quantize_pipeline(pipe, "w8a6-modiff")
after = draw()

counts = pipe.trajectories["unet"]
print(f"{counts.quantized} of {counts.total} evaluations had activations of 6 bits")
print(f"PSNR to the full-precision images: {psnr_db(after, before).mean():.1f} dB")

modiff.restore_pipeline(pipe)
print("restored bit for bit:", torch.equal(draw(), before))
