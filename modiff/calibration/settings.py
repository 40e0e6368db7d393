"""What a calibration may take: data, memory, steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from modiff.errors import ConfigError

Ranges = Literal["minmax", "moving_average", "percentile", "lp", "lsq"]
RANGES: tuple[str, ...] = get_args(Ranges)


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of :func:`modiff.calibration.calibrate`; the defaults suit networks of a few million weights on a CPU.

    Args:
        evaluations: How many evaluations of each trajectory are recorded, spread evenly over it (Q-Diffusion); all of a
            shorter trajectory. None: all.
        memory_mib: Peak of what is held of recorded data: moments of inputs, and samples before they spill to disk.
        samples: Largest number of samples recorded of a block, in all.
        positions: Input vectors recorded of an operator, in all; a convolution has one at every pixel of its output.
        stage_size: GPTQ only: operators whose data come from the same closed-loop run; smaller is slower, and later
            operators see more of the weights that were found already. AdaRound and BRECQ run once for each operator or
            block: their targets are the teacher's, so each makes up for the errors before it, which must be final.
        norm: p of the Lp norm in which weight scales are searched.
        damping: Added to the diagonal of an operator's Hessian, as a share of its mean.
        iterations: Gradient steps for each operator or block.
        batch_size: Samples in a gradient step of a block.
        learning_rate: Of Adam, on AdaRound's V.
        regularization: λ, the weight of the mean rounding penalty against the reconstruction error, where an error of 1
            is that of rounding to nearest: it means the same for every operator.
        warmup: Share of the steps before the penalty begins.
        beta: First and last β of the penalty, annealed by a cosine.
        tuning_iterations: Gradient steps in which scales and biases of all operators are tuned on the denoiser's
            output, after the codes are found; 0: not at all. It holds the activations of ``batch_size`` samples of
            the whole denoiser, and its quantized weights in float32.
        tuning_rate: Of Adam in these steps: relative changes of scales; falls to 0 by a cosine.
        compare_with_nearest: After all, sample with the weights that were found and with those rounded to nearest, and
            keep the ones whose trajectories end nearer to the teacher's: three more closed-loop runs.
        smoothing: α of SmoothQuant, 0 to 1: before anything else, outliers of input channels are moved into the weights
            of all Linears of which weight and input are quantized; None: not at all.
        split_concatenations: Operators whose input is a concatenation of two tensors along channels, such as a skip
            connection, are quantized in two halves (Q-Diffusion).
        ranges: How calibrated ranges of activations are found: ``minmax``; ``moving_average``: mean over samples of
            each one's extremes; ``percentile``; ``lp``: of least Lp norm of the error of the values; ``lsq``: step
            sizes learned by gradients, from those of ``lp`` on, so that operators' outputs lose least.
        range_evaluations: How many evaluations of each trajectory ranges are found from, spread evenly over it; None:
            all, which statistics afford.
        range_passes: Closed-loop passes, each with the ranges of the one before, the first with dynamic ones.
        percentile: Percentage of values that a range holds.
        range_norm: p of the Lp norm in which ranges are searched; 2.4 as in Q-Diffusion's reference code.
        bins: Of histograms, for ``percentile``, ``lp`` and ``lsq``; even.
        lsq_iterations: Gradient steps for each operator.
        lsq_learning_rate: Of Adam, on the logarithm of step sizes; falls to 0.

    Raises:
        ConfigError: A field is out of range.
    """

    evaluations: int | None = 8
    memory_mib: int = 512
    samples: int = 256
    positions: int = 8192
    stage_size: int = 40
    norm: float = 2.4
    damping: float = 0.01
    iterations: int = 300
    batch_size: int = 16
    learning_rate: float = 0.03
    regularization: float = 10.0
    warmup: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    tuning_iterations: int = 200
    tuning_rate: float = 0.002
    compare_with_nearest: bool = True
    smoothing: float | None = None
    split_concatenations: bool = False
    ranges: Ranges = "minmax"
    range_evaluations: int | None = None
    range_passes: int = 2
    percentile: float = 99.9
    range_norm: float = 2.4
    bins: int = 2048
    lsq_iterations: int = 200
    lsq_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise ConfigError(f"ranges is {self.ranges!r}; allowed are {', '.join(RANGES)}.")
        whole = ("memory_mib", "samples", "positions", "stage_size", "iterations", "batch_size")
        for name in (*whole, "range_passes", "bins", "lsq_iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; allowed are whole numbers of at least 1.")
        if (
            isinstance(self.tuning_iterations, bool)
            or not isinstance(self.tuning_iterations, int)
            or self.tuning_iterations < 0
        ):
            raise ConfigError(f"tuning_iterations is {self.tuning_iterations!r}; give a whole number, 0 for no tuning.")
        for name in ("split_concatenations", "compare_with_nearest"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}; allowed are true and false.")
        if self.smoothing is not None and (
            isinstance(self.smoothing, bool)
            or not isinstance(self.smoothing, (int, float))
            or not 0 <= self.smoothing <= 1
        ):
            raise ConfigError(f"smoothing is {self.smoothing!r}; allowed is 0 to 1, or None for none.")
        if self.bins % 2:
            raise ConfigError(f"bins is {self.bins}; give an even number, half of them for negative values.")
        for name in ("evaluations", "range_evaluations"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; give a whole number of at least 1, or None for all.")
        for name, low, high in (
            ("norm", 1, 10),
            ("range_norm", 1, 10),
            ("percentile", 50, 100),
            ("lsq_learning_rate", 0, 1),
            ("damping", 0, 1),
            ("tuning_rate", 0, 1),
            ("learning_rate", 0, 10),
            ("regularization", 0, 1e6),
            ("warmup", 0, 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}; allowed is {low} to {high:g}.")
        beta = tuple(self.beta) if isinstance(self.beta, (list, tuple)) else ()
        if len(beta) != 2 or not all(isinstance(b, (int, float)) and b > 0 for b in beta):
            raise ConfigError(f"beta is {self.beta!r}; give the first and the last β, such as (20, 2).")
        object.__setattr__(self, "beta", (float(beta[0]), float(beta[1])))

    @property
    def observer(self) -> str:
        """Name of the observer that ranges begin with."""
        return "lp" if self.ranges == "lsq" else self.ranges

    @property
    def memory(self) -> int:
        """``memory_mib`` in bytes."""
        return self.memory_mib * 2**20
