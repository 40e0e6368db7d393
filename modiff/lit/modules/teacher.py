"""Lightning modules that are trained: the full-precision teacher, and the classifier that measures its images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.features import FeatureClassifier
from modiff.metrics.statistics import FeatureStatistics
from modiff.teachers.patched import make_denoiser


class LitTeacher(LightningModule):
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
        self._random_state: dict[str, Any] | None = None
        self.scheduler = DDIMScheduler(**(schedule or {}))
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.sample_steps = sample_steps

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the predicted noise for images ``[B, C, H, W]`` in [0, 1]."""
        clean = (images * 2 - 1).to(memory_format=self.memory_format)
        device = clean.device if generator is None else generator.device
        noise = torch.randn(clean.shape, generator=generator, device=device).to(clean)
        steps = self.scheduler.config.num_train_timesteps
        timestep = torch.randint(0, steps, (len(clean),), generator=generator, device=device).to(clean.device)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random numbers, so that a resumed training draws the noise of an uninterrupted one."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        checkpoint["random_state"] = {"cpu": torch.get_rng_state(), "cuda": cuda}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read it; checkpoints of earlier versions have none."""
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """Go on with it. It is one rank's: several would draw the same noise from it."""
        state, self._random_state = self._random_state, None
        if state is None or self.trainer.world_size > 1:
            return
        torch.set_rng_state(state["cpu"].cpu())
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """One optimizer step."""
        loss = self.loss(batch["image"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss on the test images, with the same noise at every validation."""
        generator = torch.Generator().manual_seed(batch_idx)
        self.log("val/loss", self.loss(batch["image"], generator), prog_bar=True, sync_dist=True)

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


class LitClassifier(LightningModule):
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
        images = batch["image"]
        shift = [int(s) for s in torch.randint(-2, 3, (2,))]
        images = torch.roll(images, shift, dims=(2, 3)) + self.noise * torch.randn_like(images)
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


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile does not work on this device, in a line; None where it does. Tried on a small function."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail in their own ways: none found, broken, no headers
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> dict[str, Any]:
    """Learning rate by optimizer step: a linear rise over ``warmup`` steps, then a cosine to zero at ``total``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
