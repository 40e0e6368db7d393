"""Lightning modules that are trained: the full-precision teacher, and the classifier that measures its images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor, nn

from modiff.compiling.probe import compiler_problem
from modiff.errors import CheckpointError, ConfigError
from modiff.lit.modules.seeded import IndexSeeded
from modiff.metrics.features import FeatureClassifier
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.patched import make_denoiser
from modiff.teachers.sampling.noise import indexed_integers, indexed_noise

TRAINING_STREAM, VALIDATION_STREAM = 2**41, 2**41 + 2
"""Of the random numbers of training, each with the one after it: far from the streams of sampling and calibration."""


class LitTeacher(IndexSeeded):
    """Trains a small unconditional denoiser to predict the noise (Ho et al. 2020, equation 14).

    Args:
        denoiser: Arguments of ``diffusers.UNet2DModel``; with ``patch_size``, of
            :class:`modiff.teachers.patched.PatchedUNet2DModel`.
        schedule: Arguments of ``diffusers.DDIMScheduler``.
        learning_rate: Peak of the learning rate, which rises linearly.
        warmup_steps: Optimizer steps of the linear rise.
        weight_decay: Of AdamW.
        sample_steps: DDIM steps of the sample grids drawn at each validation.
        channels_last: Keep weights and images in the layout that tensor cores want.
        compile: Train through ``torch.compile``; where that finds no compiler, one line says so.
        decay: ``cosine``: the learning rate falls to zero at the last step; ``none``: it stays, so that the training
            may stop or go on at any step, and the averaged weights do what the fall would.
        snr_gamma: Weight each image's loss by min(SNR, gamma) / SNR (Hang et al. 2023, "Efficient Diffusion Training
            via Min-SNR Weighting Strategy"); None: all alike.
        init_from: Folder of a denoiser of this architecture (``config.json`` and safetensors) to start from.

    Raises:
        ConfigError: A field is wrong.
        CheckpointError: ``init_from`` holds no denoiser, or one of another architecture.
    """

    def __init__(
        self,
        denoiser: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        sample_steps: int = 50,
        channels_last: bool = False,
        compile: bool = False,
        decay: Literal["cosine", "none"] = "cosine",
        snr_gamma: float | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        if snr_gamma is not None and not snr_gamma > 0:
            raise ConfigError(f"snr_gamma is {snr_gamma}; allowed are numbers above 0, or null.")
        self.decay = decay
        self.snr_gamma = snr_gamma
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.denoiser = make_denoiser(denoiser).to(memory_format=self.memory_format)
        if init_from is not None:
            start_from(self.denoiser, Path(init_from))
        self.use_compile = compile
        self._training_denoiser: Callable[..., Any] | None = None
        self.scheduler = DDIMScheduler(**(schedule or {}))
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.sample_steps = sample_steps

    def loss(self, images: Tensor, numbers: Tensor, stream: int = TRAINING_STREAM) -> Tensor:
        """Mean squared error of the predicted noise.

        Args:
            images: ``[B, C, H, W]`` in [0, 1].
            numbers: int64 ``[B]``, on the CPU; noise and time step of an image depend on the seed and on its number.
            stream: Of the random numbers; the next one is used as well.
        """
        clean = (images * 2 - 1).to(memory_format=self.memory_format)
        rows, steps = numbers.tolist(), self.scheduler.config.num_train_timesteps
        noise = indexed_noise(self.random_seed, rows, tuple(clean.shape[1:]), stream).to(clean)
        noise = noise.contiguous(memory_format=self.memory_format)
        timestep = indexed_integers(self.random_seed, rows, steps, stream=stream + 1)[:, 0].to(clean.device)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        # Validation and sampling go without compilation: their batches have other sizes.
        compiled = self._training_denoiser if self.training else None
        predicted = (compiled or self.denoiser)(noisy, timestep).sample.float()
        if self.snr_gamma is None or not self.training:
            return nn.functional.mse_loss(predicted, noise)
        signal = self.scheduler.alphas_cumprod.to(device=clean.device)[timestep]
        weight = (self.snr_gamma * (1 - signal) / signal).clamp(max=1)
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    def on_fit_start(self) -> None:
        """Compile, where asked for and possible."""
        super().on_fit_start()
        if not self.use_compile:
            return
        problem = compiler_problem(self.device)
        if problem is None:
            # The method, not the module: a second module would double every name in the checkpoints.
            self._training_denoiser = torch.compile(self.denoiser.forward)
        elif self.trainer.is_global_zero:
            print(f"torch.compile finds no working compiler here ({problem}); training goes on without it.")

    def on_fit_end(self) -> None:
        """The compiled function belongs to this fit."""
        self._training_denoiser = None

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """One optimizer step."""
        loss = self.loss(batch["image"], batch["number"])
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)  # of the whole batch, on any number of ranks
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Loss on the test images, with the same noise at every validation."""
        loss = self.loss(batch["image"], batch["number"], VALIDATION_STREAM)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """Draw ``count`` images by DDIM: float ``[count, C, H, W]`` in [0, 1], on the CPU.

        The noise has a generator of its own: the random numbers of training are not touched.
        """
        pipeline = DDIMPipeline(unet=self.denoiser, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(
            count, generator=generator, num_inference_steps=self.sample_steps, output_type="np", return_dict=False
        )[0]
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; linear warm-up, then what ``decay`` says."""
        optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": self._lr_scheduler(optimizer)}

    def _lr_scheduler(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self.decay == "none":
            rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
            return {"scheduler": rise, "interval": "step"}
        total = int(self.trainer.estimated_stepping_batches)
        return cosine_schedule(optimizer, self.warmup_steps, total)

    def export(self, folder: Path) -> None:
        """Write the denoiser and its scheduler as a diffusers pipeline."""
        DDIMPipeline(unet=self.denoiser, scheduler=self.scheduler).save_pretrained(folder)


class LitClassifier(IndexSeeded):
    """Trains the small classifier whose pooled features measure a teacher's images.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes of the labels.
        num_features: Pooled features, at most half the number of images of the smallest evaluation.
        name: Printed beside every figure measured with it.
        learning_rate: Peak of the learning rate.
        noise: Standard deviation of the noise added to training images, in units of [0, 1].
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        num_features: int = 32,
        name: str = "mnist-classifier",
        learning_rate: float = 3e-3,
        noise: float = 0.05,
    ) -> None:
        super().__init__()
        self.network = FeatureClassifier(in_channels, num_classes, num_features=num_features, name=name)
        self.learning_rate = learning_rate
        self.noise = noise

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy on noisy, shifted images."""
        images, rows = batch["image"], batch["number"].tolist()
        # One shift for the whole batch, on all ranks; noise for each image.
        shift = indexed_integers(self.random_seed, [self.trainer.global_step], 5, 2, TRAINING_STREAM + 1) - 2
        noise = indexed_noise(self.random_seed, rows, tuple(images.shape[1:]), TRAINING_STREAM).to(images)
        images = torch.roll(images, shift[0].tolist(), dims=(2, 3)) + self.noise * noise
        loss = nn.functional.cross_entropy(self.network.logits(images), batch["label"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """Accuracy on the test images."""
        correct = self.network.logits(batch["image"]).argmax(dim=1) == batch["label"]
        self.log("val/accuracy", correct.float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW; linear warm-up, then cosine to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        total = int(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": cosine_schedule(optimizer, 50, total)}

    def export(self, folder: Path) -> None:
        """Write the network, ``features.safetensors``, and the feature statistics of the training images."""
        folder.mkdir(parents=True, exist_ok=True)
        network = self.network.eval()
        network.save(folder / "features.safetensors")
        loader = self.trainer.datamodule.train_dataloader()
        images = loader.dataset
        with torch.no_grad():
            features = torch.cat(
                [
                    network(images.__getitems__(list(range(i, min(i + 500, len(images)))))["image"].to(self.device))
                    for i in range(0, len(images), 500)
                ]
            )
        FeatureStatistics.from_features(features, network.name).save(folder / "feature_statistics.safetensors")


def start_from(denoiser: nn.Module, folder: Path) -> None:
    """Copy the weights of a saved denoiser of the same architecture.

    Raises:
        CheckpointError: The folder holds none, or one of another architecture.
    """
    try:
        saved = type(denoiser).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
        denoiser.load_state_dict(saved.state_dict())
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"init_from {str(folder)!r} holds no weights for this denoiser ({reason}). Give the unet/ folder of a "
            "pipeline of the same architecture."
        ) from error


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> dict[str, Any]:
    """Learning rate by optimizer step: a linear rise over ``warmup`` steps, then a cosine to zero at ``total``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
