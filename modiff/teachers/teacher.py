"""A loaded teacher: what one needs to draw images with it, or with its student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import ConfigError
from modiff.teachers.families import FAMILIES, TEXT, Family, first_tensor
from modiff.teachers.sampling.noise import indexed_noise

DECODE_BATCH = 4  # a decoder at full size needs gigabytes per image
EMPTY_TEXT = 2**40  # index of a tiny model's embedding of the empty prompt


@dataclass
class Teacher:
    """A pretrained denoiser with everything around it.

    Args:
        denoiser: In evaluation mode, gradients off.
        scheduler_config: Of the scheduler it was trained with.
        sample_shape: ``(channels, height, width)`` of x_t.
        fingerprint: Content hash of weights and configuration.
        family: How the denoiser is called.
        decoder: Latents to images; None for models of pixels.
        guidance: Scale of the classifier-free guidance that is used by default; 1: none.
        encode: Prompts to embeddings, ``encode(prompts, guided)`` as :func:`modiff.teachers.text.make_encoder` makes
            it; None: a tiny model, which takes random embeddings.
    """

    denoiser: nn.Module
    scheduler_config: dict[str, Any]
    sample_shape: tuple[int, int, int]
    fingerprint: str
    family: Family = FAMILIES["pixel"]
    decoder: nn.Module | None = None
    guidance: float = 1.0
    encode: Callable[[list[str], bool], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        if self.decoder is None:
            return self.sample_shape
        factor = decoder_factor(self.decoder)
        channels = getattr(self.decoder.config, "out_channels", None) or self.decoder.config.in_channels
        return channels, self.sample_shape[1] * factor, self.sample_shape[2] * factor

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional model, the empty one not counted."""
        return int(self.denoiser.config.num_embeds_ada_norm) if self.family.condition == "label" else None

    def doubled(self, guidance: float) -> bool:
        """Whether guidance evaluates two rows for each sample."""
        return self.family.guided and guidance > 1

    def conditioning(
        self, indices: Sequence[int], conditions: Sequence[int] | Sequence[str] | None, guidance: float
    ) -> dict[str, Tensor]:
        """Return what the denoiser is told about samples ``indices``.

        Args:
            indices: Of the samples.
            conditions: Their classes or prompts; None: classes in turn, by index; for a tiny model random embeddings.
            guidance: Scale; above 1 the rows without condition follow those with it.

        Returns:
            Tensors by name, B or 2B rows, on the CPU or where the text encoders are; empty where unconditional.

        Raises:
            ConfigError: A condition is missing, unknown or of the wrong kind.
        """
        if self.family.condition is None:
            if conditions is not None:
                raise ConfigError("This teacher is unconditional, but data gives labels or prompts. Remove them.")
            return {}
        if self.family.condition == "label":
            return self._labels(indices, conditions, guidance)
        return self._texts(indices, conditions, guidance)

    def _labels(
        self, indices: Sequence[int], conditions: Sequence[int] | Sequence[str] | None, guidance: float
    ) -> dict[str, Tensor]:
        classes = self.num_classes or 0
        labels = [i % classes for i in indices] if conditions is None else list(conditions)
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < classes]
        if wrong:
            raise ConfigError(f"label {wrong[0]!r} is no class of this teacher; allowed are 0 to {classes - 1}.")
        empty = [classes] * len(labels) if self.doubled(guidance) else []
        return {"class_labels": torch.tensor([*labels, *empty])}

    def _texts(
        self, indices: Sequence[int], conditions: Sequence[int] | Sequence[str] | None, guidance: float
    ) -> dict[str, Tensor]:
        doubled = self.doubled(guidance)
        if self.encode is not None:
            if conditions is None or not all(isinstance(text, str) for text in conditions):
                raise ConfigError(
                    "This teacher draws from text, but data gives no prompts. Give --data.prompts, a text or CSV file "
                    "or a Hugging Face data set."
                )
            result = self.encode([str(text) for text in conditions], doubled)
        else:
            rows = [*indices, *([EMPTY_TEXT] * len(indices) if doubled else [])]
            assert self.family.embeddings is not None
            shapes = self.family.embeddings(self.denoiser.config)
            result = {
                name: indexed_noise(0, rows, shape, stream=k) if shape else torch.ones(len(rows), TEXT)
                for k, (name, shape) in enumerate(shapes.items())
            }
        config, rows_count = self.denoiser.config, len(indices) * (1 + doubled)
        if "text_embeds" in result:  # SDXL is told the size and the crop: here whole images of the size that is drawn
            _, height, width = self.image_shape
            size = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            result["time_ids"] = size.expand(rows_count, -1)
        if getattr(config, "guidance_embeds", False):
            result["guidance"] = torch.full((rows_count,), float(guidance))
        return result

    def inputs(
        self, x: Tensor, t: Tensor | int, conditioning: dict[str, Tensor], guidance: float
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Make the arguments of the denoiser's forward for ``x`` ``[B, C, H, W]``, with guidance's second rows."""
        if self.family.condition is None:
            return (x, t), {}
        x = torch.cat([x, x]) if self.doubled(guidance) else x
        conditioning = {name: tensor.to(x.device) for name, tensor in conditioning.items()}
        time = torch.as_tensor(t, device=x.device)
        return (), self.family.arguments(x, time, conditioning, self.denoiser.config)

    def bind(
        self, denoiser: Callable[..., Any], conditioning: dict[str, Tensor], guidance: float
    ) -> Callable[[Tensor, Any], Any]:
        """Make ``denoiser(x, t)`` for a sampler: conditioned, and guided in one batch (Ho & Salimans 2022, eq. 6).

        Args:
            denoiser: The teacher's or a student of it.
            conditioning: Of :meth:`conditioning`, for the batch that is sampled.
            guidance: Scale w: ``uncond + w (cond - uncond)``; not above 1: the condition alone.
        """
        if self.family.condition is None:
            return denoiser

        def predict(x: Tensor, t: Any) -> Tensor:
            args, kwargs = self.inputs(x, t, conditioning, guidance)
            output = self.family.output(first_tensor(denoiser(*args, **kwargs)), x)
            if not self.doubled(guidance):
                return output
            conditional, empty = output.chunk(2)
            return empty + guidance * (conditional - empty)

        return predict

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1], float32 ``[B, C, H, W]``; models of pixels give their x_0 back."""
        if self.decoder is None:
            return latents
        config = self.decoder.config
        scale, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
        latents = latents / scale + shift
        dtype = next(self.decoder.parameters()).dtype
        parts = [first_tensor(self.decoder.decode(part.to(dtype))) for part in latents.split(DECODE_BATCH)]
        return torch.cat(parts).float()


def decoder_factor(decoder: nn.Module) -> int:
    """Return the pixels of an image along one side for each latent."""
    config = decoder.config
    widths = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
    return int(2 ** (len(widths) - 1))
