"""Samplers by name: diffusers' schedulers, and the quadratic DDIM time steps that diffusers does not have."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from modiff.errors import ConfigError
from modiff.teachers.sampling.flux_schedule import FlowMatchFluxScheduler


class QuadraticDDIMScheduler(DDIMScheduler):
    """DDIM with the quadratic time steps of the CIFAR-10 protocol (Song et al. 2021, appendix D.2).

    ``S`` steps visit ``int(linspace(0, sqrt(0.8 T), S) ** 2)``, from the largest down. The list is uneven, so the
    previous step comes from the list and not from a constant stride; it may repeat (``S = 100`` visits 0 four times,
    which the protocol evaluates four times as well), so the place in the list is counted. The protocol neither clips
    (``clip_sample=False``) nor stops short of alpha 1 (``set_alpha_to_one=True``, the default).

    Takes the arguments of ``diffusers.DDIMScheduler``; ``timestep_spacing`` and ``steps_offset`` have no effect.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the time steps and go back to the first one.

        Args:
            num_inference_steps: Evaluations, 2 to ``num_train_timesteps``.
            device: Where ``timesteps`` (int64, ``[num_inference_steps]``) is put.

        Raises:
            ConfigError: The number of steps is out of range.
        """
        total = self.config.num_train_timesteps
        if not 2 <= num_inference_steps <= total:
            raise ConfigError(
                f"steps is {num_inference_steps}; quadratic DDIM allows 2 to {total} (num_train_timesteps). Set "
                "steps to a number in that range, such as 100."
            )
        squares = np.linspace(0, np.sqrt(total * 0.8), num_inference_steps) ** 2
        self._times = [int(t) for t in squares][::-1]
        self._place = 0
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(self._times, dtype=torch.int64, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at another place of the list than the first (image-to-image pipelines)."""
        self._place = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Make one DDIM update (equations 12 and 16 of the paper) to the next entry of the list, at last to alpha 1.

        Args:
            model_output: The denoiser's answer, ``[B, C, *spatial]``.
            timestep: The entry of ``timesteps`` whose turn it is.
            sample: ``x_t``, in the same shape.
            eta: 0: deterministic; 1: as much noise as DDPM.
            use_clipped_model_output: Derive the noise again from the clipped image.
            generator: Draws the noise where ``variance_noise`` is None.
            variance_noise: The noise, in the shape of the sample.
            return_dict: Return an output object and not a tuple.

        Raises:
            ConfigError: ``set_timesteps`` was not called, or the steps were not taken in its order.
        """
        t, prev = self._advance(int(timestep))
        alpha = self.alphas_cumprod[t]
        alpha_prev = self.alphas_cumprod[prev] if prev >= 0 else self.final_alpha_cumprod
        clean, noise = self._predictions(model_output, sample, alpha)
        if self.config.thresholding:
            clean = self._threshold_sample(clean)
        elif self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            noise = (sample - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        sigma = eta * self._get_variance(t, prev).sqrt()
        previous = alpha_prev.sqrt() * clean + (1 - alpha_prev - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0:
            if variance_noise is None:
                variance_noise = torch.randn(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device if generator is None else generator.device,
                    dtype=model_output.dtype,
                ).to(model_output.device)
            previous = previous + sigma * variance_noise
        if not return_dict:
            return previous, clean
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=clean)

    def _advance(self, timestep: int) -> tuple[int, int]:
        """Check whose turn it is; return the time step and the one that follows, -1 after the last."""
        if self.num_inference_steps is None:
            raise ConfigError("The scheduler has no time steps yet. Call scheduler.set_timesteps(steps) first.")
        expected = self._times[self._place] if self._place < len(self._times) else None
        if timestep != expected:
            turn = "all its steps are taken" if expected is None else f"time step {expected} is next"
            raise ConfigError(
                f"step was called for time step {timestep}, but {turn}. Go through scheduler.timesteps once, in order, "
                "and call set_timesteps before each trajectory."
            )
        self._place += 1
        return timestep, self._times[self._place] if self._place < len(self._times) else -1

    def _predictions(self, output: Tensor, sample: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image and the noise that the denoiser's answer stands for."""
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * output) / signal, output
        if self.config.prediction_type == "sample":
            return output, (sample - signal * output) / sigma
        if self.config.prediction_type == "v_prediction":
            return signal * sample - sigma * output, signal * output + sigma * sample
        raise ConfigError(
            f"prediction_type is {self.config.prediction_type!r}; quadratic DDIM allows 'epsilon', 'sample' and "
            "'v_prediction'."
        )


_SINGLESTEP = {"lower_order_final": True}  # else diffusers switches it on by itself, with a warning

SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"timestep_spacing": "leading"}),
    "ddim_trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "ddim_quadratic": (QuadraticDDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": False}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp_2s": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, **_SINGLESTEP},
    ),
    "dpmpp_3s": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 3, **_SINGLESTEP},
    ),
    "dpm_solver_2": (
        diffusers.DPMSolverSinglestepScheduler,
        {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min", **_SINGLESTEP},
    ),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "flow_euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "flow_euler_flux": (FlowMatchFluxScheduler, {}),
}
"""Class and fixed arguments of each sampler by name; anything else by its class path."""
STOCHASTIC = frozenset({"ddpm", "euler_ancestral"})
"""Samplers of :data:`SAMPLERS` that add noise in their steps, so that their images depend on more than x_T."""


def make_scheduler(name_or_class_path: str, config: Mapping[str, Any] | Any = None, **overrides: Any) -> Any:
    """Make a scheduler by name or class path, in the noise schedule of a teacher.

    Args:
        name_or_class_path: A key of :data:`SAMPLERS`, or ``package.module.Class`` with ``set_timesteps`` and ``step``.
        config: The teacher's scheduler, its config, or a plain dictionary of arguments; None: the class's defaults.
            A saved config may hold arguments of other classes, which are left out; a plain dictionary may not.
        **overrides: Arguments that replace those of ``config`` and of the name.

    Returns:
        A new scheduler; ``config`` is not changed.

    Raises:
        ConfigError: The name, an argument or a value is unknown, or the teacher's noise process is of another kind
            (flow matching against diffusion).

    >>> make_scheduler("ddim_quadratic", num_train_timesteps=100).__class__.__name__
    'QuadraticDDIMScheduler'
    """
    cls, fixed = _resolve(name_or_class_path)
    saved = getattr(config, "config", config)
    if saved is None:
        saved = {}
    if not isinstance(saved, Mapping):
        raise ConfigError(
            f"scheduler config is {config!r}; give a diffusers scheduler, its config, or a dictionary of arguments."
        )
    allowed = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    # A live scheduler's config does not hold its class name, a saved one does.
    of_scheduler = "_class_name" in saved or "_use_default_values" in saved or hasattr(config, "config")
    unknown = sorted((set(overrides) | (set() if of_scheduler else set(saved))) - allowed)
    if unknown:
        raise ConfigError(
            f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}; allowed are {', '.join(sorted(allowed))}."
        )
    arguments = {**fixed, **overrides}
    if of_scheduler:
        source = str(saved.get("_class_name") or (type(config).__name__ if hasattr(config, "config") else "scheduler"))
        _refuse_other_process(cls, source, saved, arguments)
    try:
        with warnings.catch_warnings():
            # diffusers discourages the first DPM-Solver; published rows are drawn with it.
            warnings.filterwarnings("ignore", "`algorithm_types=dpmsolver` is deprecated", FutureWarning)
            if hasattr(cls, "from_config"):
                return cls.from_config(dict(saved), **arguments)
            return cls(**{key: value for key, value in saved.items() if key in allowed}, **arguments)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"{cls.__name__} refuses its arguments: {error} Change them in the scheduler's config."
        ) from error


def _resolve(name: str) -> tuple[type, dict[str, Any]]:
    if name in SAMPLERS:
        return SAMPLERS[name]
    hint = f"allowed are {', '.join(SAMPLERS)}, or a class path such as 'diffusers.LCMScheduler'."
    if not isinstance(name, str) or "." not in name:
        raise ConfigError(f"unknown sampler {name!r}; {hint}")
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"sampler {name!r} cannot be imported ({error}); {hint}") from error
    if not (inspect.isclass(cls) and hasattr(cls, "set_timesteps") and hasattr(cls, "step")):
        raise ConfigError(f"{name!r} is no scheduler: it needs set_timesteps(steps) and step(output, t, x); {hint}")
    return cls, {}


def _refuse_other_process(cls: type, source: str, saved: Mapping[str, Any], arguments: dict[str, Any]) -> None:
    """Refuse to read a velocity as noise: flow-matching models predict it on a straight path."""
    by_sigmas = bool(saved.get("use_flow_sigmas", False))  # solvers that do both say so by this argument
    from_flow = by_sigmas or source.startswith("FlowMatch") or ("shift" in saved and "beta_start" not in saved)
    to_flow = cls.__name__.startswith("FlowMatch") or bool(arguments.get("use_flow_sigmas", by_sigmas))
    if from_flow == to_flow:
        return
    kinds = ("flow matching", "diffusion") if from_flow else ("diffusion", "flow matching")
    fix = (
        "Use 'flow_euler', or a solver with use_flow_sigmas=True and prediction_type='flow_prediction'."
        if from_flow
        else "Use a sampler that is not of flow matching, such as 'ddim'."
    )
    raise ConfigError(f"The teacher's {source} is of {kinds[0]}, but {cls.__name__} is of {kinds[1]}. {fix}")
