"""How well images fit their prompts: the CLIP score, of the extra ``modiff[clip]``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError

CLIP = "openai/clip-vit-base-patch16"
"""The model of torchmetrics' examples; scores of another one do not compare with its scores."""


class ClipScore(nn.Module):
    """``100 max(cos(image, text), 0)`` of each image and its prompt (Hessel et al. 2021, there with 2.5 for 100).

    torchmetrics' own takes the maximum after the mean and fails on the outputs of transformers 5, so only its scale is
    used here. Prompts are cut at the length the model was trained on (77 tokens).

    Args:
        model: Name of a CLIP model in the hub's local cache, or its folder. Nothing is downloaded.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: The model is not on this machine.
    """

    def __init__(self, model: str = CLIP) -> None:
        super().__init__()
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ConfigError(
                f"The CLIP score needs transformers, which is not installed or lacks a part: {error}. "
                "Run: pip install 'modiff[clip]'."
            ) from error
        try:
            self.network = CLIPModel.from_pretrained(model, local_files_only=True).eval().requires_grad_(False)
            self.processor = CLIPProcessor.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"CLIP model {model!r} is neither a folder nor in the local cache of the hub, or is damaged "
                f"({str(error).strip().splitlines()[0]}). Run: hf download {model}; or give the folder of a CLIP model."
            ) from error
        self.name = model

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``[N]``, 0 to 100.

        Args:
            images: Float ``[N, 1 or 3, H, W]``, clamped here to [0, 1] and rounded to 8 bits; grey ones are repeated.
            prompts: One for each image.

        Raises:
            ConfigError: The numbers differ, or there are neither one nor three channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(prompts):
            raise ConfigError(
                f"The CLIP score takes images [N, 1 or 3, H, W] and N prompts, got {list(images.shape)} and "
                f"{len(prompts)}. Give one prompt for each image."
            )
        pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).cpu()
        prepared = self.processor(
            images=list(pixels), text=list(prompts), return_tensors="pt", padding=True, truncation=True
        )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            output: Any = self.network(**prepared.to(images.device))
        image, text = (nn.functional.normalize(x.float(), dim=-1) for x in (output.image_embeds, output.text_embeds))
        return 100 * (image * text).sum(dim=-1).clamp(min=0)
