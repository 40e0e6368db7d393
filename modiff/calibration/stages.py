"""In which order, and from which runs, weights are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from modiff.calibration.loop.moments import moment_bytes, no_data
from modiff.calibration.loop.tracing import Trace
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights import WeightMethod
from modiff.errors import CalibrationError
from modiff.operators.quantized import QuantizedOperator
from modiff.student.blocks import find_blocks


@dataclass(frozen=True)
class Stage:
    """What is found from the data of one closed-loop run.

    Args:
        operators: Operators whose weights are quantized, in the order of their calls.
        block: The block that they make up; None: each stands alone.
    """

    operators: tuple[str, ...]
    block: str | None = None


def plan_stages(
    teacher: nn.Module,
    found: Mapping[str, QuantizedOperator],
    names: Sequence[str],
    trace: Trace,
    method: WeightMethod,
    settings: CalibrationSettings,
) -> list[Stage]:
    """Divide operators into stages, in the order of their first calls.

    Raises:
        CalibrationError: An operator was never called, or its moments alone exceed the memory.
    """
    for name in names:
        if name not in trace.calls:
            raise no_data(name)
    blocks = find_blocks(teacher, names, trace.usable) if method.by_block else {}
    block_of = {name: block for block, held in blocks.items() for name in held}
    most = method.operators_per_run(settings)
    stages: list[Stage] = []
    alone: list[str] = []
    size = 0

    def close() -> None:
        nonlocal size
        if alone:
            stages.append(Stage(tuple(alone)))
        alone.clear()
        size = 0

    for name in (name for name in trace.order if name in set(names)):
        if name in block_of:
            if not any(stage.block == block_of[name] for stage in stages):
                close()
                stages.append(Stage(blocks[block_of[name]], block_of[name]))
            continue
        needed = moment_bytes(found[name])
        if needed > settings.memory:
            raise CalibrationError(
                f"The moments of operator {name!r} take {needed / 2**20:.0f} MiB, but memory_mib is "
                f"{settings.memory_mib}. Raise it, or give the operator Rule({name!r}, skip=True)."
            )
        if len(alone) == most or size + needed > settings.memory:
            close()
        alone.append(name)
        size += needed
    close()
    return stages
