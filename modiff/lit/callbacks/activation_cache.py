"""The student's trajectory around every batch, and its memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from modiff.errors import ConfigError, TrajectoryError
from modiff.lit.modules.student import LitStudent
from modiff.student.cost import cost
from modiff.student.reuse import reuse_of
from modiff.trajectory.session import Trajectory, state_of, trajectory


class ActivationCache(Callback):
    """Opens a trajectory before a batch is drawn and closes it after; counts evaluations; refuses what cannot fit.

    Args:
        check_memory: Compare the state's size with the free memory before the first batch.

    Raises:
        ConfigError: The state of a batch does not fit; the message names a batch size that does.
        TrajectoryError: Batches differ in their number of evaluations.
    """

    def __init__(self, check_memory: bool = True) -> None:
        self.check_memory = check_memory
        self.counts: tuple[int, int] | None = None
        self.state_mib_per_image = 0.0
        self._stack = ExitStack()
        self._run: Trajectory | None = None
        self._checked = False
        self._tf32: bool | None = None

    def setup(self, *_: Any, **__: Any) -> None:
        """Turn TF32 convolutions off, which are PyTorch's default on a GPU.

        They would round every value of a float32 product to 11 bits, so that ô drifts from A(â) (invariant 1) by
        thousands of times what float32 allows. A teacher under bf16 autocast is not affected.
        """
        if self._tf32 is None:
            self._tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the setting that :meth:`setup` found."""
        if self._tf32 is not None:
            torch.backends.cudnn.allow_tf32, self._tf32 = self._tf32, None

    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        """Open the trajectory of a batch that has to be drawn, after checking that its state fits."""
        if pl_module.student is None or pl_module.stored(batch) is not None:
            return
        if self.check_memory and not self._checked:
            self.state_mib_per_image = state_of_one_image(pl_module)
            refuse_overflow(self.state_mib_per_image, len(batch["index"]), pl_module.device)
            self._checked = True
        self._run = self._stack.enter_context(trajectory(pl_module.student))

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Close the trajectory, which reports NaN or Inf, and count its evaluations."""
        facts, first = outputs["facts"], int(outputs["index"][0])
        if "teacher" in outputs and outputs["new"] and not bool(torch.isfinite(outputs["teacher"]).all()):
            raise TrajectoryError(
                f"NaN or Inf in the teacher's images {first} to {first + len(outputs['index']) - 1}. Use another "
                "precision (--trainer.precision 32-true); finished batches are kept."
            )
        if self._run is not None:
            self._stack.close()
            facts["evaluations"], facts["quantized"] = self._run.total, self._run.quantized
            facts["reused"] = self._run.reused
            self._run = None
        if "evaluations" not in facts:
            return
        counts = int(facts["evaluations"]), int(facts["quantized"])
        if self.counts is not None and counts != self.counts:
            raise TrajectoryError(
                f"Batches differ in evaluations (total, quantized): {self.counts} and {counts}. They must be equal."
            )
        self.counts = counts
        pl_module.result.evaluations = {"total": counts[0], "quantized": counts[1]}
        if reuse_of(state_of(pl_module.student)) is not None:
            pl_module.result.evaluations["reused"] = int(facts.get("reused", 0))

    on_predict_batch_start = on_test_batch_start
    on_predict_batch_end = on_test_batch_end

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Clear the state of a batch that did not finish."""
        if self._run is not None:
            self._run.probes.clear()
            self._run = None
        self._stack.close()
        self.teardown()


def state_of_one_image(module: LitStudent) -> float:
    """Size of the state of one image in MiB.

    Args:
        module: With its student, or the configuration of one that is still to be calibrated.
    """
    index = torch.zeros(1, dtype=torch.long)
    args, kwargs = module.inputs(module.noise(index), index)
    with module.in_precision():
        return cost(module.student, *args, **kwargs).state_mib_per_image * module.rows_per_image


def explain_out_of_memory(error: BaseException, module: LitStudent, batch_size: int, where: str) -> ConfigError | None:
    """What to do about an allocation that failed; None where that was not the trouble.

    The batch that would fit is from the cost model: what is not weights or state is taken to grow with the batch.
    """
    text = str(error).lower()
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in text:
        return None
    each, free = state_of_one_image(module), free_mib(module.device)
    fits = max(1, min(batch_size // 2, int(0.5 * free / each) if each else batch_size // 2))
    smaller = f"batch {fits} would fit (--data.batch_size {fits}, in another --output)"
    return ConfigError(
        f"Out of memory at {where}: the state of a batch of {batch_size} is {each * batch_size / 1024:.2f} GiB, and "
        f"{free / 1024:.2f} GiB are free beside the models. "
        + (f"By the cost model {smaller}." if batch_size > 1 else "Not even one image fits; take a larger device.")
        + " Finished batches are kept."
    )


def refuse_overflow(each: float, batch_size: int, device: torch.device, option: str = "--data.batch_size") -> None:
    """Compare the size of a batch's state with the free memory.

    Args:
        each: MiB of one image.
        batch_size: Images drawn together.
        device: Where they are drawn.
        option: Where the batch size is set.

    Raises:
        ConfigError: The state does not fit; the message names a batch size that does.
    """
    needed, free = each * batch_size, free_mib(device)
    if needed > free:
        fits = min(int(0.8 * free / each) or int(free / each), batch_size - 1)
        fix = f"use batch {fits} ({option} {fits})" if fits else "not even one image fits; free memory"
        sizes = f"needs {needed / 1024:.2f} GiB, free {free / 1024:.2f} GiB"
        raise ConfigError(f"The state of a batch of {batch_size} {sizes}: {fix}.")


def free_mib(device: torch.device) -> float:
    """Free memory of a device, MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return psutil.virtual_memory().available / 2**20
