"""``modiff.search``: the same search for a diffusers pipeline of the user's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.compiling.modes import compile as compile_student
from modiff.errors import ConfigError
from modiff.lit.search.frontier import write_frontier
from modiff.lit.search.goals import DISTANCES, Quality, parse_budget, parse_cost
from modiff.lit.search.page import write_page
from modiff.lit.search.space import SearchSpace, Setting
from modiff.lit.search.study import Search
from modiff.lit.search.target import Measured, unclipped
from modiff.storage.hashing import hash_tensors
from modiff.student.cost import cost as count
from modiff.student.cost import weight_bytes
from modiff.student.pipeline import quantize_pipeline, restore_pipeline
from modiff.teachers.sampling.schedulers import make_scheduler

DENOISERS = ("unet", "transformer")


class PipelineTarget:
    """A diffusers pipeline; between measurements it is as it was.

    Args:
        pipe: In full precision, on its device, with one denoiser named ``unet`` or ``transformer``.
        prompts: One for each image, in turn; None: the pipeline takes none.
        seed: Image i starts from ``torch.Generator().manual_seed(seed + i)``.
        batch_size: Images drawn at once.
        contexts: As for :func:`modiff.quantize_pipeline`.
        arguments: Further arguments of ``pipe(...)``, such as ``height`` or ``guidance_scale``.

    Raises:
        ConfigError: The pipeline has no such denoiser, or is quantized already.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        batch_size: int = 1,
        contexts: Sequence[str] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        found = [name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)]
        if len(found) != 1:
            raise ConfigError(
                f"{type(pipe).__name__} has no single denoiser named {' or '.join(DENOISERS)}. Search with a teacher "
                "of the zoo (modiff search), or a pipeline that has one."
            )
        if hasattr(pipe, "trajectories"):
            raise ConfigError("The pipeline is quantized already. Call modiff.restore_pipeline(pipe) first.")
        self.pipe, self.name = pipe, found[0]
        self.prompts = None if prompts is None else list(prompts)
        self.seed, self.batch_size, self.contexts = seed, batch_size, contexts
        self.arguments = dict(arguments or {})
        self.fingerprint = hash_tensors(dict(self.denoiser.named_parameters()))
        self.noise = {"seed": seed, "batch_size": batch_size, "prompts": self.prompts}
        self._unit: float | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser, as it is now."""
        module: nn.Module = getattr(self.pipe, self.name)
        return module

    def converged(self, sampler: str, steps: int, count: int) -> Tensor:
        """The full-precision images of a sampler, ``[count, C, H, W]`` in [-1, 1]."""
        return torch.cat([self._draw(sampler, steps, batch)[0] for batch in self._batches(count)])

    def measure(self, setting: Setting, images: int) -> Measured:
        """Draw a setting's images; the pipeline is restored however that ends."""
        config = setting.config()
        unit = self._one_evaluation(setting.sampler)
        if config is not None:
            quantize_pipeline(self.pipe, config, contexts=self.contexts)
        try:
            if setting.compile and config is not None:
                compile_student(self.denoiser)
            batches = self._batches(images)
            if setting.compile:
                self._draw(setting.sampler, min(setting.steps, 3), batches[0])  # compiles outside of the timing
            calls = _Calls()
            drawn = [self._draw(setting.sampler, setting.steps, batch, calls) for batch in batches]
            evaluations = calls.number // len(batches)
            args, kwargs = calls.arguments
            found = count(self.denoiser, *args, evaluations=max(evaluations, 1), **kwargs)
            memory = weight_bytes(self.denoiser) / 2**20 + found.state_mib_per_image * calls.rows / self.batch_size
        finally:
            if config is not None:
                restore_pipeline(self.pipe)
        rows = calls.rows / self.batch_size
        return Measured(
            images=torch.cat([image for image, _ in drawn]),
            time=statistics.median(seconds for _, seconds in drawn) / unit,
            seconds=sum(seconds for _, seconds in drawn) / (len(drawn) * self.batch_size),
            gbops=found.gbops_per_evaluation * rows * evaluations,
            memory=memory,
            evaluations=evaluations,
        )

    def _batches(self, images: int) -> list[list[int]]:
        whole = -(-images // self.batch_size) * self.batch_size
        return [list(range(i, i + self.batch_size)) for i in range(0, whole, self.batch_size)]

    def _draw(self, sampler: str, steps: int, batch: list[int], calls: _Calls | None = None) -> tuple[Tensor, float]:
        """Images of a batch in [-1, 1], and the seconds they took."""
        before = self.pipe.scheduler
        self.pipe.scheduler = make_scheduler(sampler, before, **unclipped(sampler))
        given = dict(self.arguments)
        if self.prompts is not None:
            given["prompt"] = [self.prompts[i % len(self.prompts)] for i in batch]
        else:
            given["batch_size"] = len(batch)
        given["generator"] = [torch.Generator().manual_seed(self.seed + i) for i in batch]
        handle = None if calls is None else self.denoiser.register_forward_pre_hook(calls, with_kwargs=True)
        progress = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(disable=True)
        try:
            start = time.perf_counter()
            output = self.pipe(num_inference_steps=steps, output_type="np", **given).images
            seconds = time.perf_counter() - start
        finally:
            self.pipe.scheduler = before
            self.pipe.set_progress_bar_config(**(progress or {}))
            if handle is not None:
                handle.remove()
        return torch.from_numpy(output).permute(0, 3, 1, 2).float() * 2 - 1, seconds

    def _one_evaluation(self, sampler: str) -> float:
        """Seconds of one full-precision evaluation of a batch: the difference of a longer and a shorter trajectory."""
        batch, short, long = self._batches(1)[0], _Calls(), _Calls()
        self._draw(sampler, 2, batch)
        first = self._draw(sampler, 2, batch, short)[1]
        second = self._draw(sampler, 6, batch, long)[1]
        return max((second - first) / max(long.number - short.number, 1), 1e-9)


class _Calls:
    """A forward pre-hook that counts the denoiser's calls and keeps the arguments of the last one."""

    def __init__(self) -> None:
        self.number = 0
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.number += 1
        self.arguments = args, dict(kwargs)

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch."""
        args, kwargs = self.arguments
        return next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 0), 1)


def search_pipeline(
    pipe: Any,
    quality: str = "psnr_db >= 30",
    prompts: Sequence[str] | None = None,
    *,
    cost: str = "gbops",
    budget: str = "20m",
    output: str = "runs/search",
    space: SearchSpace | None = None,
    images: int = 2,
    confirm_images: int = 4,
    batch_size: int = 1,
    seed: int = 0,
    reference_sampler: str = "dpmpp_2m",
    reference_steps: int = 100,
    contexts: Sequence[str] | None = None,
    arguments: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Find the cheapest setting of a pipeline that keeps a quality; the public name is ``modiff.search``.

    Args:
        pipe: A diffusers pipeline in full precision; afterwards it is as it was.
        quality: Such as ``"psnr_db >= 30"``: to the pipeline's own converged images from the same noise.
        prompts: One for each image, in turn.
        cost: ``time``, ``gbops`` or ``memory``.
        budget: Such as ``"20m"``.
        output: Folder of the study, the frontier and its page; the same call goes on where an earlier one stopped.
        space: What may be chosen; None: the default :class:`modiff.lit.search.space.SearchSpace`.
        images: Drawn for each new setting, ``batch_size`` at once; image i starts from generator ``seed + i``.
        confirm_images: Drawn again for promising ones.
        batch_size: See ``images``.
        seed: See ``images``.
        reference_sampler: Deterministic sampler of the reference; its convergence is checked.
        reference_steps: Its steps.
        contexts: As for :func:`modiff.quantize_pipeline`.
        arguments: Further arguments of ``pipe(...)``.
        say: Called with one line of progress at a time.

    Returns:
        What ``frontier.json`` holds: ``best``, ``frontier``, ``points`` and sentences about them.

    Raises:
        ConfigError: A goal is impossible, the budget too short, or the pipeline has no single denoiser.
    """
    wanted, lowered = Quality.parse(quality), parse_cost(cost)
    target = PipelineTarget(pipe, prompts, seed, batch_size, contexts, arguments)
    reference = {"reference_sampler": reference_sampler, "reference_steps": reference_steps}
    drawn = {"images": images, "confirm_images": confirm_images}
    if wanted.name in DISTANCES:
        raise ConfigError(
            f"quality is {wanted.name}, which modiff.search does not measure. Ask for psnr_db or relative_l2, or use "
            "the command modiff search, which measures distances."
        )
    study = Search(target, space or SearchSpace(), wanted, lowered, Path(output), **drawn, **reference, say=say)
    points = study.run(parse_budget(budget))
    result = write_frontier(study.folder, points, wanted, lowered, _about(pipe, study, seed))
    write_page(study.folder, result)
    return result


def _about(pipe: Any, study: Search, seed: int) -> dict[str, Any]:
    """What the record says of the search itself."""
    return {
        "teacher": {"pipeline": type(pipe).__name__},
        "seed": seed,
        "reference": {"sampler": study.reference_sampler, "steps": study.reference_steps, "clipped": False},
        "command": f"modiff.search({type(pipe).__name__}, {str(study.quality)!r}, cost={study.cost!r})",
    }
