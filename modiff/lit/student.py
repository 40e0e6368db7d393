"""The Lightning module of a quantized student beside its full-precision teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from modiff.checkpoint import load
from modiff.config import QuantConfig
from modiff.conversion import quantize
from modiff.errors import ConfigError
from modiff.lit.store import BatchStore
from modiff.teachers.noise import indexed_noise
from modiff.teachers.sampling import sample, set_timesteps
from modiff.teachers.schedulers import make_scheduler
from modiff.teachers.zoo import Teacher, TeacherSpec, load_teacher

OnEvaluation = Callable[[int, Any, Tensor], None]


class LitStudent(LightningModule):
    """Draws images with the teacher and with its quantized student, from the same noise.

    Args:
        teacher: The pretrained denoiser.
        preset: Quantization by name, such as ``w8a4-modiff``; excludes ``config``.
        config: Quantization in full; excludes ``preset``.
        scheduler: Sampler: ``ddim``, ``ddim_trailing``, ``ddim_quadratic``, ... or a class path.
        steps: Time steps of the sampler.
        eta: Noise added by DDIM in each step, 0 (none) to 1 (DDPM).
        features: Feature network for the Fréchet distance (safetensors or TorchScript); None: the teacher's own.
        reference: Feature statistics of real images; None: the teacher's own.

    Raises:
        ConfigError: ``preset`` and ``config`` are both given, or a number is out of range.
    """

    def __init__(
        self,
        teacher: TeacherSpec = TeacherSpec(),  # noqa: B008 (frozen)
        preset: str | None = None,
        config: QuantConfig | None = None,
        scheduler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        features: str | None = None,
        reference: str | None = None,
    ) -> None:
        super().__init__()
        if preset is not None and config is not None:
            raise ConfigError("preset and config are both given. Remove one of them.")
        if steps < 1:
            raise ConfigError(f"steps is {steps}; allowed are whole numbers, 1 or more.")
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta}; allowed is 0 to 1.")
        self.spec = teacher
        self.config = QuantConfig.preset(preset) if preset is not None else config
        self.scheduler_name = scheduler
        self.steps = steps
        self.eta = eta
        self.features = features
        self.reference = reference
        self.seed = 0
        self.ckpt: str | None = None
        self.store: BatchStore | None = None
        self.teacher_store: BatchStore | None = None
        self.loaded: Teacher | None = None
        self.teacher: nn.Module | None = None
        self.student: nn.Module | None = None
        self.results: dict[str, Any] = {}

    def configure_model(self) -> None:
        """Load the teacher; make the student, which shares every tensor it does not quantize."""
        if self.teacher is not None:
            return
        self.loaded = load_teacher(self.spec)
        set_timesteps(make_scheduler(self.scheduler_name, self.loaded.scheduler_config), self.steps)  # refuses early
        self.teacher = self.loaded.denoiser
        if self.config is None and self.ckpt is None:
            return
        shared = {id(p): p for p in (*self.teacher.parameters(), *self.teacher.buffers())}
        base = copy.deepcopy(self.teacher, shared)
        self.student = quantize(base, self.config) if self.config is not None else load(self.ckpt, copy.deepcopy(base))

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of x_t."""
        assert self.loaded is not None
        return self.loaded.sample_shape

    def noise(self, indices: Tensor, stream: int = 0) -> Tensor:
        """x_T (or the noise of a step) of samples ``indices`` ``[B]``, float32 ``[B, C, H, W]``."""
        return indexed_noise(self.seed, indices.tolist(), self.sample_shape, stream).to(self.device)

    def trace(self, denoiser: nn.Module, indices: Tensor, on_evaluation: OnEvaluation | None = None) -> Tensor:
        """Run the sampler; returns x_0 in the model's own range, float32 ``[B, C, H, W]``."""
        assert self.loaded is not None
        scheduler = make_scheduler(self.scheduler_name, self.loaded.scheduler_config)
        return sample(
            denoiser,
            scheduler,
            self.noise(indices),
            self.steps,
            eta=self.eta,
            step_noise=lambda step: self.noise(indices, stream=step + 1),
            on_evaluation=on_evaluation,
        ).float()

    def draw(self, who: Literal["teacher", "student"], indices: Tensor) -> tuple[Tensor, float]:
        """Images of one batch and the seconds it took."""
        denoiser = self.teacher if who == "teacher" else self.student
        assert denoiser is not None
        start = time.perf_counter()
        images = self.trace(denoiser, indices, lambda step, *_: self._tell(step + 1, who))
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return images, time.perf_counter() - start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Draw a batch with both, or read it from disk.

        Returns:
            ``teacher`` and ``student`` ``[B, C, H, W]`` in the model's own range, ``index`` and ``valid`` ``[B]``, and
            ``facts`` (seconds; evaluations are added by ``ActivationCache``).
        """
        stored = self.stored(batch)
        if stored is None:
            teacher, teacher_s = self.draw_teacher(batch["index"])
            student, student_s = self.draw("student", batch["index"])
            images, facts = {"teacher": teacher, "student": student}, {"teacher_s": teacher_s, "student_s": student_s}
        else:
            images, facts = stored
        return {**{k: v.to(self.device) for k, v in images.items()}, **batch, "facts": facts, "new": stored is None}

    def draw_teacher(self, indices: Tensor) -> tuple[Tensor, float]:
        """The teacher's images, drawn once for all recipes that share a store."""
        first = int(indices[0])
        stored = self.teacher_store.load(first) if self.teacher_store else None
        if stored is not None and len(stored[0]["teacher"]) == len(indices):
            return stored[0]["teacher"].to(self.device), stored[1]["teacher_s"]
        images, seconds = self.draw("teacher", indices)
        if self.teacher_store:
            self.teacher_store.save(first, {"teacher": images}, {"teacher_s": seconds})
        return images, seconds

    def stored(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """What an earlier, interrupted run left of this batch."""
        if self.store is None:
            return None
        found = self.store.load(int(batch["index"][0]))
        return found if found is not None and len(found[0]["student"]) == len(batch["index"]) else None

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Draw a batch with the student, or with the teacher where nothing is quantized."""
        stored = self.stored(batch)
        if stored is not None:
            return {**stored[0], **batch, "facts": stored[1], "new": False}
        images, seconds = self.draw("student" if self.student is not None else "teacher", batch["index"])
        return {"student": images, **batch, "facts": {"student_s": seconds}, "new": True}

    def _tell(self, step: int, who: str) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_evaluation_end", None)
            if hook is not None:
                hook(step, self.steps, who)


def to_unit_range(images: Tensor) -> Tensor:
    """Images for metrics and pictures: [-1, 1] to [0, 1], clamped, not rounded."""
    return (images / 2 + 0.5).clamp(0, 1)
