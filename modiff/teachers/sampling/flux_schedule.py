"""FLUX's noise levels, which its pipeline hands to the scheduler and the scheduler alone does not know."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config


class FlowMatchFluxScheduler(FlowMatchEulerDiscreteScheduler):
    """Flow-matching Euler at the noise levels 1, 1 - 1/n, ..., 1/n, shifted by image size where the model asks for it.

    Args:
        num_train_timesteps: Of the model.
        shift: Fixed shift of the noise levels.
        use_dynamic_shifting: Shift by ``exp(mu)`` instead, mu growing linearly with the image (FLUX.1-dev).
        base_shift: mu at ``base_image_seq_len`` tokens.
        max_shift: mu at ``max_image_seq_len`` tokens.
        base_image_seq_len: Tokens of the smallest image.
        max_image_seq_len: Tokens of the largest image.
        image_seq_len: Tokens of the images that are drawn.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        image_seq_len: int = 4096,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the noise levels and go back to the first one.

        Args:
            num_inference_steps: Evaluations.
            device: Where ``timesteps`` and ``sigmas`` are put.
        """
        config = self.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (config.image_seq_len - config.base_image_seq_len)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(device=device, sigmas=sigmas, mu=mu if config.use_dynamic_shifting else None)
