"""From noise to image: one loop for every denoiser and every scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modiff.errors import ConfigError
from modiff.teachers.families import first_tensor


@torch.no_grad()
def sample(
    denoiser: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    on_evaluation: Callable[[int, Tensor | int, Tensor], None] | None = None,
) -> Tensor:
    """Draw one batch of images. A pure function: the scheduler is copied, no global random numbers are used.

    Every entry of ``scheduler.timesteps`` is one evaluation; solvers that evaluate twice per step list each time step
    twice, so there may be more evaluations than steps.

    Args:
        denoiser: ``denoiser(x, t)``; returns a tensor, a tuple that starts with one, or an object with ``.sample``.
        scheduler: Of :func:`~modiff.teachers.sampling.schedulers.make_scheduler`, or any that has ``set_timesteps`` and
            ``step``.
        noise: ``[B, C, *spatial]``, standard normal; sets device and dtype.
        steps: Sampler steps.
        eta: Share of noise of a DDIM step, 0 to 1.
        step_noise: ``step_noise(i)`` is the standard normal noise, in the shape of ``noise``, for a sampler that adds
            some after evaluation ``i``; see :func:`modiff.teachers.sampling.noise.indexed_noise`.
        on_evaluation: Called with ``(i, t, x_t)`` before evaluation ``i`` (from 0), and before ``scale_model_input``.

    Returns:
        Images (or latents) in the model's own range, ``[B, C, *spatial]``, neither clamped nor rounded.

    Raises:
        ConfigError: The scheduler lacks the time steps, has no ``eta``, or adds noise and ``step_noise`` is None; or
            the denoiser's answer has another shape than ``x``.
    """
    scheduler = copy.deepcopy(scheduler)
    arguments = _step_arguments(scheduler, eta)
    # The scheduler reads its time steps on the host: there it waits for no device. The denoiser gets them on its own.
    timesteps = set_timesteps(scheduler, steps, "cpu")
    on_device = timesteps.to(noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(timesteps):
        if on_evaluation is not None:
            on_evaluation(i, t, x)
        scale = getattr(scheduler, "scale_model_input", None)
        output = first_tensor(denoiser(x if scale is None else scale(x, t), on_device[i]))
        if output.shape != x.shape:
            raise ConfigError(
                f"The denoiser returned {list(output.shape)} for an input {list(x.shape)}. Where it predicts a "
                "variance as well, wrap it: lambda x, t: denoiser(x, t).sample[:, :channels]."
            )
        with _SuppliedNoise(step_noise, i, x.shape, type(scheduler).__name__):
            result = scheduler.step(output, t, x, **arguments)
        x = result.prev_sample if hasattr(result, "prev_sample") else result[0]
    return x


def set_timesteps(scheduler: Any, steps: int, device: torch.device | str | None = None) -> Tensor:
    """Set a scheduler's time steps, and check that its noise schedule has them.

    Args:
        scheduler: Changed in place.
        steps: Sampler steps, at least 1; at most ``num_train_timesteps`` for a discrete noise schedule.
        device: Where the time steps are put.

    Returns:
        ``scheduler.timesteps``, one entry per evaluation.

    Raises:
        ConfigError: The scheduler cannot take that many steps.
    """
    name = type(scheduler).__name__
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps is {steps!r}; give a whole number of at least 1, such as 50.")
    total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    # Schedulers without alphas_cumprod (flow matching, EDM) work on a continuous time and have no such limit.
    discrete = total is not None and hasattr(scheduler, "alphas_cumprod")
    if discrete and steps > total:
        raise ConfigError(
            f"steps is {steps}, but {name} has {total} time steps. Set steps to at most {total}, or give the scheduler "
            "a noise schedule with more (num_train_timesteps)."
        )
    try:
        scheduler.set_timesteps(steps, device=device)
    except ConfigError:
        raise
    except (ValueError, IndexError, ZeroDivisionError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"{name} cannot set {steps} steps: {error} Use another number of steps, or change the scheduler's config."
        ) from error
    timesteps = scheduler.timesteps
    values = timesteps.double()
    if (
        len(timesteps) == 0
        or not values.isfinite().all()
        or (discrete and not ((values >= 0) & (values < total)).all())
    ):
        raise ConfigError(
            f"With {steps} steps, {name} asks for time steps {_range_text(values)}, and the noise schedule has 0 to "
            f"{total - 1 if discrete else 'any'}. Use a number of steps that divides it, or another timestep_spacing."
        )
    return timesteps


class _SuppliedNoise(TorchFunctionMode):
    """Answers ``torch.randn`` inside a scheduler's step with the caller's noise.

    Schedulers differ in how they take noise (``variance_noise``, ``generator``, neither), and a generator cannot return
    given numbers; all of diffusers' draw it by ``torch.randn``, once per step. The mode is local to the thread.
    """

    _supplied = (torch.randn, torch.randn_like)
    _refused = (torch.rand, torch.rand_like, torch.normal, torch.Tensor.normal_, torch.Tensor.uniform_)

    def __init__(self, step_noise: Callable[[int], Tensor] | None, index: int, shape: torch.Size, name: str) -> None:
        super().__init__()
        self.step_noise = step_noise
        self.index = index
        self.shape = shape
        self.name = name
        self.drawn = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace draws of normal noise, refuse others, leave everything else alone."""
        kwargs = kwargs or {}
        if func in self._refused:
            raise ConfigError(
                f"{self.name} draws random numbers in a way that cannot be seeded by sample index ({func.__name__}). "
                "Use a scheduler that draws its noise by torch.randn."
            )
        if func not in self._supplied:
            return func(*args, **kwargs)
        if self.step_noise is None:
            raise ConfigError(
                f"{self.name} adds noise in its steps, but step_noise is None. Give step_noise(i), for example from "
                "indexed_noise(seed, indices, shape, stream=1 + i), or use a deterministic sampler."
            )
        if self.drawn:
            raise ConfigError(
                f"{self.name} draws noise twice in one step; step_noise(i) holds one. Use another scheduler."
            )
        self.drawn = True
        noise = self.step_noise(self.index)
        if noise.shape != self.shape:
            raise ConfigError(
                f"step_noise({self.index}) has shape {list(noise.shape)}, but the images have {list(self.shape)}. "
                "Return noise for the whole batch."
            )
        like = args[0] if func is torch.randn_like else None
        dtype = kwargs.get("dtype") or (torch.get_default_dtype() if like is None else like.dtype)
        device = kwargs.get("device") or (noise.device if like is None else like.device)
        return noise.to(device=device, dtype=dtype)


def _step_arguments(scheduler: Any, eta: float) -> dict[str, Any]:
    parameters = inspect.signature(scheduler.step).parameters
    if "eta" in parameters:
        if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta!r}; allowed is 0 (deterministic) to 1 (as much noise as DDPM).")
        return {"eta": float(eta)}
    if eta:
        raise ConfigError(
            f"eta is {eta}, but {type(scheduler).__name__} has no eta. Set eta to 0, or use a DDIM sampler."
        )
    return {}


def _range_text(values: Tensor) -> str:
    return "none" if values.numel() == 0 else f"from {values.max().item():g} to {values.min().item():g}"
