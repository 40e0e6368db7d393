"""What a search draws images with: a teacher of the zoo, under any setting."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modiff.compiling.modes import compile as compile_student
from modiff.errors import ConfigError
from modiff.lit.search.space import Setting
from modiff.student.cost import cost, weight_bytes
from modiff.student.swap import quantize
from modiff.teachers.sampling.loop import sample, set_timesteps
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.teacher import Teacher
from modiff.trajectory.session import trajectory

UNCLIPPED = {"clip_sample": False, "thresholding": False}
"""Clipping x_0 makes the end of a trajectory depend on the number of steps, so that no sampler converges."""
KEPT_STUDENTS = 3


def unclipped(sampler: str) -> dict[str, bool]:
    """Arguments that keep a sampler from clipping x_0, as far as it has them."""
    allowed = inspect.signature(type(make_scheduler(sampler)).__init__).parameters
    return {key: value for key, value in UNCLIPPED.items() if key in allowed}


@dataclass(frozen=True)
class Measured:
    """Images of a setting, and what they cost.

    Args:
        images: ``[N, C, H, W]`` in the model's own range, decoded.
        time: Seconds per image, over the seconds that the full-precision teacher takes for one evaluation of one image
            in the same batch, measured in turns.
        seconds: Per image.
        gbops: Bit operations per image, whole trajectory.
        memory: MiB of the weights and of one image's state.
        evaluations: Denoiser calls per trajectory.
    """

    images: Tensor
    time: float
    seconds: float
    gbops: float
    memory: float
    evaluations: int


class Target(Protocol):
    """What :class:`modiff.lit.search.study.Search` asks of a model."""

    fingerprint: str
    noise: dict[str, Any]  # what else the images depend on, such as the seed

    def measure(self, setting: Setting, count: int) -> Measured:
        """Draw images ``0 .. count - 1`` of a setting, timed and counted."""

    def converged(self, sampler: str, steps: int, count: int) -> Tensor:
        """The full-precision images of a sampler, from the same noise."""


class TeacherTarget:
    """A teacher of the zoo.

    Args:
        teacher: Loaded.
        conditions: Class or prompt of each index; None: the teacher's own choice.
        guidance: Scale of classifier-free guidance; None: the teacher's.
        seed: Image i starts from the noise of (seed, i).
        batch_size: Images drawn at once.
    """

    def __init__(
        self,
        teacher: Teacher,
        conditions: Callable[[list[int]], Sequence[int] | Sequence[str] | None] | None = None,
        guidance: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        self.teacher = teacher
        self.conditions = conditions or (lambda indices: None)
        self.guidance = teacher.guidance if guidance is None else guidance
        self.seed = seed
        self.batch_size = batch_size
        self.fingerprint = teacher.fingerprint
        self.noise = {"seed": seed, "batch_size": batch_size, "guidance": self.guidance}
        self._students: OrderedDict[Any, nn.Module] = OrderedDict()
        self._costs: dict[Any, tuple[float, float]] = {}

    def scheduler(self, sampler: str) -> Any:
        """A sampler that does not clip x_0, so that more steps converge."""
        return make_scheduler(sampler, self.teacher.scheduler_config, **unclipped(sampler))

    def converged(self, sampler: str, steps: int, count: int) -> Tensor:
        """The full-precision images of a sampler, ``[count, C, H, W]``."""
        return torch.cat([self._draw(self.teacher.denoiser, sampler, steps, batch) for batch in self._batches(count)])

    def measure(self, setting: Setting, count: int) -> Measured:
        """Draw a setting's images; each batch is timed between two of the teacher's evaluations.

        Raises:
            ConfigError: The sampler cannot take that many steps.
        """
        evaluations = len(set_timesteps(self.scheduler(setting.sampler), setting.steps))
        denoiser = self.denoiser(setting)
        gbops, memory = self._cost(setting, denoiser, evaluations)
        images, seconds, units = [], [], []
        batches = self._batches(count)
        if setting.compile:
            self._draw(denoiser, setting.sampler, min(setting.steps, 3), batches[0])  # compiles outside of the timing
        for batch in batches:
            unit = self._one_evaluation(batch)
            start = time.perf_counter()
            images.append(self._draw(denoiser, setting.sampler, setting.steps, batch))
            seconds.append(time.perf_counter() - start)
            units.append((unit + self._one_evaluation(batch)) / 2)
        ratio = statistics.median(s / u for s, u in zip(seconds, units, strict=True))
        return Measured(torch.cat(images), ratio, sum(seconds) / count, gbops * evaluations, memory, evaluations)

    def denoiser(self, setting: Setting) -> nn.Module:
        """The teacher, or its student of a setting; a few are kept, since trials return to them."""
        config = setting.config()
        if config is None and not setting.compile:
            return self.teacher.denoiser
        key = (config, setting.compile)
        if key not in self._students:
            shared = {id(t): t for t in (*self.teacher.denoiser.parameters(), *self.teacher.denoiser.buffers())}
            model = copy.deepcopy(self.teacher.denoiser, shared)
            if config is None:
                model.compile()
            else:
                model = quantize(model, config)
                if setting.compile:
                    compile_student(model)
            self._students[key] = model
            while len(self._students) > KEPT_STUDENTS:
                self._students.popitem(last=False)
        self._students.move_to_end(key)
        return self._students[key]

    def _batches(self, count: int) -> list[list[int]]:
        if count < 1:
            raise ConfigError(f"num_images is {count}; allowed are whole numbers, 1 or more.")
        # Whole batches: the image of an index may depend on the batch size, and on nothing else (invariant 3).
        whole = -(-count // self.batch_size) * self.batch_size
        return [list(range(i, i + self.batch_size)) for i in range(0, whole, self.batch_size)]

    def _bound(self, denoiser: nn.Module, indices: list[int]) -> Callable[[Tensor, Any], Any]:
        conditioning = self.teacher.conditioning(indices, self.conditions(indices), self.guidance)
        return self.teacher.bind(denoiser, conditioning, self.guidance)

    def _draw(self, denoiser: nn.Module, sampler: str, steps: int, indices: list[int]) -> Tensor:
        noise = indexed_noise(self.seed, indices, self.teacher.sample_shape)
        bound = self._bound(denoiser, indices)

        def step_noise(step: int) -> Tensor:
            return indexed_noise(self.seed, indices, self.teacher.sample_shape, stream=step + 1)

        with trajectory(denoiser) if hasattr(denoiser, "_modiff_state") else nullcontext():
            latents = sample(bound, self.scheduler(sampler), noise, steps, step_noise=step_noise)
        return self.teacher.decode(latents.float())

    @torch.no_grad()
    def _one_evaluation(self, indices: list[int]) -> float:
        """Seconds of one full-precision evaluation of a batch; the second of two, so that caches are warm."""
        noise = indexed_noise(self.seed, indices, self.teacher.sample_shape)
        bound = self._bound(self.teacher.denoiser, indices)
        steps = set_timesteps(self.scheduler("ddim") if self._diffuses() else self.scheduler("flow_euler"), 2)
        bound(noise, steps[0])
        start = time.perf_counter()
        bound(noise, steps[0])
        return time.perf_counter() - start

    def _diffuses(self) -> bool:
        return not str(self.teacher.scheduler_config.get("_class_name", "")).startswith("FlowMatch")

    def _cost(self, setting: Setting, denoiser: nn.Module, evaluations: int) -> tuple[float, float]:
        """GBOPs per image and evaluation, and MiB of weights and one image's state."""
        key = (setting.config(), evaluations)
        if key not in self._costs:
            counted = self.teacher.denoiser if setting.config() is None else denoiser
            noise = indexed_noise(self.seed, [0], self.teacher.sample_shape)
            conditioning = self.teacher.conditioning([0], self.conditions([0]), self.guidance)
            args, kwargs = self.teacher.inputs(noise, 0, conditioning, self.guidance)
            found = cost(counted, *args, evaluations=evaluations, **kwargs)
            self._costs[key] = found.gbops_per_evaluation, weight_bytes(counted) / 2**20 + found.state_mib_per_image
        return self._costs[key]
