"""A learned method that ends worse than it began keeps what it began with.

Each stage of a calibration lowers an error of its own: of an operator, a block, or one evaluation. None of them is what
counts, which is where a whole trajectory ends, and with coarse activations the two can disagree. So once all weights
are found, the student samples twice more, with them and with the weights rounded to nearest, and the better ones stay.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.capture import ClosedLoop
from modiff.config import QuantConfig
from modiff.errors import CalibrationError
from modiff.quantizers.packing import PackedWeight
from modiff.student.copies import shared_copy
from modiff.student.swap import convert, operators

LOGGER = logging.getLogger(__name__)


def keep_the_better(
    loop: ClosedLoop, learned: Mapping[str, PackedWeight], nearest: Mapping[str, PackedWeight]
) -> dict[str, PackedWeight]:
    """Choose, by where the run's trajectories end, between learned weights and those rounded to nearest.

    The measure is the distance of a trajectory's last input from that of the teacher's own trajectory, relative to its
    norm, in the mean over trajectories.

    Args:
        loop: The student, with the learned weights in place; it keeps the better ones.
        learned: By operator.
        nearest: The same operators'.
    """
    teacher = convert(shared_copy(loop.teacher), QuantConfig(), keep_teacher=True)
    wanted = last_inputs(ClosedLoop(teacher, loop.teacher, loop.run, loop.reducer), like=loop)
    errors = {}
    for kind, weights in (("nearest", nearest), ("learned", learned)):
        for name, packed in weights.items():
            operators(loop.student)[name].use(packed)
        found = last_inputs(loop, like=loop)
        parts = loop.reducer.gather([_distance(found[key], wanted[key]) for key in wanted])
        errors[kind] = math.fsum(sum(parts, [])) / sum(map(len, parts))
    if errors["learned"] <= errors["nearest"]:
        return dict(learned)
    LOGGER.warning(
        "Weights found from data end %.4f away from the teacher, weights rounded to nearest %.4f: the latter are kept. "
        "Calibrate on more images, with another seed, or by another method.",
        errors["learned"],
        errors["nearest"],
    )
    for name, packed in nearest.items():
        operators(loop.student)[name].use(packed)
    return dict(nearest)


def last_inputs(loop: ClosedLoop, like: ClosedLoop) -> dict[int, Tensor]:
    """The first tensor of the last call of each trajectory of this process, by the trajectory's number.

    Args:
        loop: Its student is run.
        like: The loop that knows which trajectories are this process's.
    """
    loop.mine = like.mine
    found: dict[int, Tensor] = {}

    def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in CallArguments.of(args, kwargs)[1].values() if t.is_floating_point() and t.ndim > 1]
        if not tensors:
            raise CalibrationError("The denoiser gets no tensor with a batch, so its trajectories cannot be compared.")
        found[loop.trajectory] = tensors[0].detach().float().clone()

    loop.drive(begin, lambda *_: None)
    return found


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


__all__ = ["keep_the_better", "last_inputs"]
