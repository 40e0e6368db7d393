"""What a weight method is, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.moments import Moments
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.settings import CalibrationSettings
from modiff.config.quant import QuantSpec
from modiff.errors import ConfigError
from modiff.quantizers.rounding import QuantizedWeight, round_nearest


@dataclass(frozen=True)
class WeightProblem:
    """The weight of one operator, which a method is to quantize.

    Args:
        name: The operator.
        weight: ``[out, in / groups, *kernel]``.
        spec: Its quantizer.
    """

    name: str
    weight: Tensor
    spec: QuantSpec

    def nearest(self) -> QuantizedWeight:
        """The weight rounded to nearest: the grid on which the methods that use data choose their codes."""
        return round_nearest(self.weight, self.spec)


class WeightMethod:
    """How the weights of a student's operators are quantized.

    A method that needs no data overrides :meth:`round`, or is ``plain``. One that uses data sets ``uses_data`` and
    overrides :meth:`solve`, and, where it reconstructs whole blocks, sets ``by_block`` and overrides
    :meth:`solve_block`.

    Attributes:
        name: By which :func:`register` knows it.
        plain: Whether it does what :func:`modiff.quantize` does by itself, so that nothing is to be found.
        uses_data: Whether it is given what a closed-loop run of the student shows. Scales and biases are tuned
            afterwards (:func:`modiff.calibration.tuning.tune`).
        by_block: Whether the operators of a block are quantized together; those outside of blocks stand alone.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    uses_data: ClassVar[bool] = False
    by_block: ClassVar[bool] = False

    def operators_per_run(self, settings: CalibrationSettings) -> int:
        """How many operators may get their data from the same run.

        One where targets are the teacher's: operators that share a run would each make up for the same error.
        """
        return 1

    def round(self, problem: WeightProblem, settings: CalibrationSettings) -> QuantizedWeight:
        """Quantize a weight from itself alone."""
        raise NotImplementedError

    def solve(self, problem: WeightProblem, moments: Moments, settings: CalibrationSettings) -> QuantizedWeight:
        """Quantize a weight from the moments of the operator's inputs and targets."""
        raise NotImplementedError

    def solve_block(
        self,
        block: nn.Module,
        problems: Mapping[str, WeightProblem],
        store: SampleStore,
        arguments: CallArguments,
        settings: CalibrationSettings,
        generator: torch.Generator,
    ) -> dict[str, QuantizedWeight]:
        """Quantize the weights of a block from samples of its inputs and targets.

        Args:
            block: The teacher's module, which is left as it is.
            problems: By the operator's name relative to the block.
            store: Recorded inputs and targets.
            arguments: How the inputs make up the block's arguments.
            settings: Of the calibration.
            generator: Draws batches, on the CPU.
        """
        raise NotImplementedError


Method = TypeVar("Method", bound=type[WeightMethod])
_METHODS: dict[str, WeightMethod] = {}


def register(name: str) -> Callable[[Method], Method]:
    """Decorator: make a :class:`WeightMethod` known by a name.

    Raises:
        ConfigError: The name is taken.
    """

    def add(cls: Method) -> Method:
        if name in _METHODS:
            raise ConfigError(f"There is a weight method {name!r} already. Give another name.")
        cls.name = name
        _METHODS[name] = cls()
        return cls

    return add


def weight_methods() -> tuple[str, ...]:
    """Names of all methods, in alphabetical order."""
    return tuple(sorted(_METHODS))


def weight_method(name: str) -> WeightMethod:
    """A method by its name.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in _METHODS:
        raise ConfigError(f"method is {name!r}; allowed are {', '.join(weight_methods())}.")
    return _METHODS[name]
