"""The Lightning module of a quantized student beside its full-precision teacher."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from modiff.compiling.modes import compile as compile_student
from modiff.config.quant import QuantConfig
from modiff.errors import CalibrationError, ConfigError, ModiffError
from modiff.lit.modules.calibration_config import CalibrationConfig, refuse_useless_calibration
from modiff.lit.modules.precision import casting, dtype_of, in_dtype
from modiff.lit.report.result import Result
from modiff.lit.runs.batch_store import BatchStore
from modiff.lit.runs.control import stopping
from modiff.storage.folder import read_manifest
from modiff.storage.hashing import hash_tensors
from modiff.student.checkpoint import load
from modiff.student.copies import shared_copy
from modiff.student.swap import quantize
from modiff.student.tensors import slots
from modiff.teachers.sampling.loop import sample, set_timesteps
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import Teacher, TeacherSpec, load_teacher

OnEvaluation = Callable[[int, Any, Tensor], None]
Conditions = Callable[[list[int]], "Sequence[int] | Sequence[str] | None"]
Noise = Callable[[Tensor, int], Tensor]


class LitStudent(LightningModule):
    """Draws images with the teacher and with its quantized student, from the same noise.

    Args:
        teacher: The pretrained denoiser.
        preset: Quantization by name, such as ``w8a4-modiff``; excludes ``config``.
        config: Quantization in full; excludes ``preset``.
        scheduler: Sampler: ``ddim``, ``ddim_trailing``, ``ddim_quadratic``, ... or a class path; None: the teacher's
            in the zoo.
        steps: Time steps of the sampler; None: the teacher's in the zoo.
        eta: Noise added by DDIM in each step, 0 (none) to 1 (DDPM).
        features: Feature network for the Fréchet distance (safetensors or TorchScript); None: the teacher's own.
        reference: Real images, as feature statistics (safetensors, npz), a parquet file or a folder of images; None:
            the teacher's own.
        guidance: Scale of the classifier-free guidance, 1: none; None: the teacher's in the zoo.
        clip: CLIP model of the CLIP score, a name in the hub's cache or a folder; None:
            ``openai/clip-vit-base-patch16`` where it is there. It needs prompts and ``modiff[clip]``.
        calibration: How weights are found from the student's own trajectories; None: rounded to nearest.
        compile: Draw with the student compiled (:func:`modiff.compile`), never the teacher; where there is no compiler,
            one line says so. ``modiff bench`` compiles both, and compares them.
        choose: Of the compiled student: ``measured`` leaves in full precision what integers make no faster.
        compute_dtype: Of the compiled student between its operators: ``bfloat16``; None: as the teacher.
        scheduler_options: Arguments of the sampler that replace the teacher's, such as ``clip_sample: false``.

    Raises:
        ConfigError: ``preset`` and ``config`` are both given, or a number is out of range.
    """

    def __init__(
        self,
        teacher: TeacherSpec = TeacherSpec(),  # noqa: B008 (frozen)
        preset: str | None = None,
        config: QuantConfig | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        eta: float = 0.0,
        features: str | None = None,
        reference: str | None = None,
        guidance: float | None = None,
        clip: str | None = None,
        calibration: CalibrationConfig | None = None,
        compile: bool = False,  # noqa: A002 (its name in recipes)
        choose: Literal["measured"] | None = None,
        compute_dtype: Literal["bfloat16"] | None = None,
        scheduler_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if preset is not None and config is not None:
            raise ConfigError("preset and config are both given. Remove one of them.")
        steps = teacher.entry.steps if steps is None else steps
        if steps < 1:
            raise ConfigError(f"steps is {steps}; allowed are whole numbers, 1 or more.")
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta}; allowed is 0 to 1.")
        if guidance is not None and guidance < 0:
            raise ConfigError(f"guidance is {guidance}; allowed are 0 or more, 1 for none.")
        self.spec = teacher
        self.config = QuantConfig.preset(preset) if preset is not None else config
        self.scheduler_name = teacher.entry.scheduler if scheduler is None else scheduler
        self.scheduler_options = dict(scheduler_options or {})
        self.steps = steps
        self.eta = eta
        self.features = features
        self.reference = reference
        self.clip = clip
        self.guidance = teacher.entry.guidance if guidance is None else guidance
        self.calibration = calibration
        self.calibrated = calibration is None
        if not compile and (choose is not None or compute_dtype is not None):
            raise ConfigError(
                "model.choose and model.compute_dtype are of compiled students. Add --model.compile true."
            )
        self.use_compile, self.compile_options = compile, {"choose": choose, "compute_dtype": compute_dtype}
        self.conditions: Conditions = lambda indices: None
        self.seed = 0
        self.ckpt: str | None = None
        self.store: BatchStore | None = None
        self.teacher_store: BatchStore | None = None
        self.result = Result()
        self._loaded: Teacher | None = None
        self._conditioning: tuple[tuple[int, ...], dict[str, Tensor]] | None = None
        self.teacher: nn.Module | None = None
        self.student: nn.Module | None = None
        self.decoder: nn.Module | None = None

    def configure_model(self) -> None:
        """Lightning's hook: prepare with the defaults, unless the command has prepared the module already."""
        if self._loaded is None:
            self.prepare()

    def prepare(
        self,
        seed: int = 0,
        conditions: Conditions | None = None,
        ckpt: str | None = None,
        loaded: Teacher | None = None,
    ) -> LitStudent:
        """Load the teacher and make the student, which shares every tensor that it does not quantize; once.

        Args:
            seed: Of the noise.
            conditions: Gives the classes or prompts of sample indices; None: the samples have none.
            ckpt: Packed student, in place of the recipe's quantization.
            loaded: A teacher that is loaded already, to be shared; None: load the recipe's.

        Returns:
            The module itself.

        Raises:
            ConfigError: The module was prepared before, or the teacher does not fit the recipe.
            CalibrationError: The checkpoint was made of another teacher, or there is nothing to calibrate.
        """
        if self._loaded is not None:
            raise ConfigError("This LitStudent is prepared already. Make another one for another teacher or seed.")
        self.seed, self.ckpt = seed, ckpt
        self.conditions = conditions or self.conditions
        loaded = load_teacher(self.spec) if loaded is None else loaded
        set_timesteps(self.make_scheduler(loaded), self.steps)  # refuses early
        self._refuse_guidance(loaded)
        self._loaded, self.teacher, self.decoder = loaded, loaded.denoiser, loaded.decoder
        if ckpt is not None:
            self._refuse_foreign(ckpt)
            self.calibrated = True
        if self.config is not None or ckpt is not None:
            self.student = self.make_student()
            if self.ckpt is None:
                refuse_useless_calibration(self.student, self.calibration)
                _ = self.teacher_hash  # before the Trainer changes dtypes
        return self

    def make_scheduler(self, loaded: Teacher) -> Any:
        """A new sampler in the noise schedule of the teacher."""
        return make_scheduler(self.scheduler_name, loaded.scheduler_config, **self.scheduler_options)

    def keep_batches(self, store: BatchStore, teacher_store: BatchStore | None = None) -> None:
        """Store finished batches, and read those that are there in place of drawing them.

        Args:
            store: Batches of this run.
            teacher_store: The teacher's images, which several recipes share; None: they are drawn for this run alone.
        """
        self.store, self.teacher_store = store, teacher_store

    @property
    def loaded(self) -> Teacher:
        """The loaded teacher.

        Raises:
            ModiffError: The module has not been prepared.
        """
        if self._loaded is None:
            raise ModiffError("The teacher is not loaded yet. Call LitStudent.prepare() first.")
        return self._loaded

    def make_student(self) -> nn.Module:
        """Make another student of the teacher, from the checkpoint or the config, without calibrating it."""
        assert self.teacher is not None
        if self.ckpt is not None:
            return load(self.ckpt, self.shared_copy())  # puts other tensors in place of the teacher's, which stay
        assert self.config is not None
        return quantize(self.shared_copy(), self.config)

    @cached_property
    def teacher_hash(self) -> str:
        """Content hash of the teacher's weights, as they were loaded."""
        assert self.teacher is not None
        return hash_tensors({slot.name: slot.tensor for slot in slots(self.teacher)})

    def origin(self) -> dict[str, Any]:
        """How the student was made, for its checkpoint."""
        calibration = None if self.calibration is None else dataclasses.asdict(self.calibration)
        return {"teacher_hash": self.teacher_hash, "calibration": calibration}

    def _refuse_foreign(self, ckpt: str) -> None:
        """Refuse a checkpoint that says it was made from another teacher."""
        made_of = (read_manifest(Path(ckpt)).get("origin") or {}).get("teacher_hash")
        if made_of not in (None, self.teacher_hash):
            raise CalibrationError(
                f"--ckpt {ckpt} was made of another teacher (weights {made_of[:12]}..., those of {self.spec.title!r} "
                f"are {self.teacher_hash[:12]}...). Give the teacher it was made of, or quantize this one."
            )

    def shared_copy(self) -> nn.Module:
        """Copy the teacher's modules but share its tensors."""
        assert self.teacher is not None
        return shared_copy(self.teacher)

    def use_student(self, student: nn.Module, calibrated: bool) -> None:
        """Take another student of the same teacher, such as the one that a calibration found."""
        self.student = student
        self.calibrated = calibrated

    def on_test_start(self) -> None:
        """Compile the student if asked to: on its device, after calibration, outside of trajectories."""
        if self.use_compile and self.student is not None:
            compile_student(self.student, **self.compile_options)  # type: ignore[arg-type]

    on_predict_start = on_test_start

    def _refuse_guidance(self, loaded: Teacher) -> None:
        distilled = bool(getattr(loaded.denoiser.config, "guidance_embeds", False))
        if self.guidance not in (1.0, self.spec.entry.guidance) and not loaded.family.guided and not distilled:
            raise ConfigError(f"guidance is {self.guidance}, but teacher {self.spec.title!r} takes none. Remove it.")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of x_t."""
        return self.loaded.sample_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the images."""
        return self.loaded.image_shape

    def in_precision(self) -> AbstractContextManager[Any]:
        """The context in which Lightning's precision plugin runs steps; callbacks are called outside of it."""
        trainer = self._trainer
        return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()

    def noise(self, indices: Tensor, stream: int = 0) -> Tensor:
        """x_T (or the noise of a step) of samples ``indices`` ``[B]``, ``[B, C, H, W]``; at least float32."""
        noise = indexed_noise(self.seed, indices.tolist(), self.sample_shape, stream)
        return noise.to(self.device, torch.promote_types(torch.float32, dtype_of(self.teacher)))

    def conditioning(self, indices: Tensor) -> dict[str, Tensor]:
        """Conditioning inputs of the denoiser for samples ``indices`` ``[B]``; the last batch's are cached."""
        key = tuple(indices.tolist())
        if self._conditioning is None or self._conditioning[0] != key:
            found = self.loaded.conditioning(list(key), self.conditions(list(key)), self.guidance)
            self._conditioning = key, {name: tensor.to(self.device) for name, tensor in found.items()}
        return self._conditioning[1]

    def bind(self, denoiser: nn.Module, indices: Tensor) -> Callable[[Tensor, Any], Any]:
        """``denoiser(x, t)`` with the conditions and the guidance of samples ``indices`` ``[B]``, in its own precision.

        The sampler around it keeps the dtype of its noise.
        """
        assert self.loaded is not None

        bound = self.loaded.bind(casting(denoiser), self.conditioning(indices), self.guidance)

        def predict(x: Tensor, t: Any) -> Tensor:
            with self.in_precision():
                return bound(x, t).to(x.dtype)

        return predict

    def inputs(self, x: Tensor, indices: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of one forward of the denoiser at time 0, for figures of cost."""
        assert self.loaded is not None
        found: tuple[tuple[Any, ...], dict[str, Any]] = in_dtype(
            self.loaded.inputs(x, 0, self.conditioning(indices), self.guidance), dtype_of(self.teacher)
        )
        return found

    @property
    def rows_per_image(self) -> int:
        """Rows of the denoiser's batch for one image: 2 under guidance."""
        return 2 if self.loaded.doubled(self.guidance) else 1

    def denoise(
        self,
        denoiser: Callable[..., Any],
        indices: Tensor,
        on_evaluation: OnEvaluation | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Run the sampler on a denoiser of :meth:`bind`; returns x_0 in the model's own range, ``[B, C, H, W]``.

        ``noise(indices, stream)`` is that of :meth:`noise`, unless another is given.
        """
        noise = noise or self.noise
        scheduler = self.make_scheduler(self.loaded)
        return sample(
            denoiser,
            scheduler,
            noise(indices, 0),
            self.steps,
            eta=self.eta,
            step_noise=lambda step: noise(indices, step + 1),
            on_evaluation=stopping(f"images {int(indices[0])} to {int(indices[-1])}", on_evaluation),
        ).float()

    def draw(self, who: Literal["teacher", "student"], indices: Tensor) -> tuple[Tensor, float]:
        """Draw the images of one batch, and time it in seconds."""
        denoiser = self.teacher if who == "teacher" else self.student
        assert denoiser is not None
        if who == "student" and not self.calibrated:
            raise CalibrationError(
                "The recipe asks for a calibration, and the student has none yet. Give the Trainer the callback "
                "modiff.lit.callbacks.calibration.Calibration, or set model.calibration to null."
            )
        start = time.perf_counter()
        bound = self.bind(denoiser, indices)
        images = self.loaded.decode(self.denoise(bound, indices, lambda step, *_: self.notify(step + 1, who)))
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return images, time.perf_counter() - start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Draw a batch with both, or read it from disk.

        Returns:
            ``teacher`` and ``student`` ``[B, C, H, W]`` in the model's own range (latents decoded), ``index`` and
            ``valid`` ``[B]``, and ``facts`` (seconds; evaluations are added by ``ActivationCache``).
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
        """The images of this batch, if an earlier, interrupted run has drawn them."""
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

    def notify(self, step: int, who: str) -> None:
        """Tell the callbacks, where there is a Trainer, that an evaluation ended; ``step`` counts from 1."""
        if self._trainer is None:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            hook = getattr(callback, "on_evaluation_end", None)
            if hook is not None:
                hook(step, self.steps, who)


def to_unit_range(images: Tensor) -> Tensor:
    """Images for metrics and pictures: [-1, 1] to [0, 1], clamped, not rounded."""
    return (images / 2 + 0.5).clamp(0, 1)
