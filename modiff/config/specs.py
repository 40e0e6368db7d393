"""How a tensor is quantized, and how differences between evaluations are: two plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from modiff.config.checks import boolean, integer, member, shown
from modiff.errors import ConfigError

Granularity = Literal["tensor", "sample", "channel", "sample_channel", "token", "group"]
Scales = Literal["real", "power_of_two"]
Range = Literal["dynamic", "previous", "calibrated"]
Warmup = Literal["full", "refine"]
StateDtype = Literal["float32", "float16", "bfloat16"]
ReconstructionDtype = Literal["float32", "int16"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
STATE_DTYPES: tuple[StateDtype, ...] = get_args(StateDtype)
WEIGHT_GRANULARITIES = ("tensor", "channel", "group")
CALIBRATED_GRANULARITIES = ("tensor", "channel", "group")
PREVIOUS_GRANULARITIES = ("tensor", "sample")


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Args:
        bits: Width of the codes, 2 to 8.
        granularity: What keeps a scale of its own. Activations: ``tensor`` (one scale), ``sample`` (dim 0),
            ``channel`` (last dim of a Linear's input, dim 1 of a Conv's), ``sample_channel`` (both: each element of a
            ``[B, C]`` input, which is then not quantized at all), ``token`` (all but the last dim, Linear only),
            ``group`` (``group_size`` consecutive channels). ``tensor``, ``channel`` and ``group`` reduce over the
            batch, so an image then depends on the batch it is drawn in. Weights: ``tensor``, ``channel`` (output) or
            ``group`` (along the input, per output channel).
        symmetric: Codes -n..n with n = 2^(bits-1) - 1; else 0..2^bits - 1 with a zero point.
        range: ``dynamic``: from the tensor itself; ``calibrated``: from a calibration
            (:func:`modiff.calibration.calibrate`), and fixed then. Activations only, with granularity ``tensor``,
            ``channel`` or ``group``: the others have as many scales as the batch has rows. ``previous``: from the
            residual of the evaluation before, widened by a margin (:attr:`margin`); where the residual does not fit,
            from itself. Codes can then be made in the pass that finds the range, which saves a GPU a pass over memory.
            Modulated activations only, with granularity ``tensor`` or ``sample``: a sample's scales come from its own
            past. The integer warm-up ``refine`` stays dynamic.
        clip: The range is multiplied by this, 0 < clip <= 1; where modulated, not in the first evaluation. A calibrated
            range is multiplied once, when it is calibrated.
        group_size: Channels in a group, for ``granularity="group"`` only; the last group may be short.
        timestep_buckets: Calibrated ranges along a trajectory: evaluation i of n uses bucket i * buckets // n.
            Residuals shrink along a trajectory, so one range for all of it is wide at its end. n is the length that was
            calibrated: a longer trajectory is refused, a shorter one gets the first ranges only, so
            calibrate with the steps that are sampled.
        scales: ``real``: any number; ``power_of_two``, for ``sample_channel`` activations: powers of two times one
            scale per sample. Codes and exponents then share a container of 8 bits, so that products of integers stay
            exact (docs/method.md); bits up to 7 when symmetric, up to 6 otherwise.

    Raises:
        ConfigError: A field is out of range, or fields contradict each other.
    """

    bits: int = 8
    granularity: Granularity = "tensor"
    symmetric: bool = True
    range: Range = "dynamic"
    clip: float = 1.0
    group_size: int | None = None
    timestep_buckets: int = 1
    scales: Scales = "real"

    def __post_init__(self) -> None:
        integer("bits", self.bits, low=2, high=8, hint="; for full precision set the whole spec to null")
        member("granularity", self.granularity, GRANULARITIES)
        boolean("symmetric", self.symmetric)
        member("range", self.range, get_args(Range))
        if self.range == "calibrated" and self.granularity not in CALIBRATED_GRANULARITIES:
            raise ConfigError(
                f"range is 'calibrated' with granularity {self.granularity!r}, whose scales belong to rows of a batch; "
                f"allowed are {', '.join(CALIBRATED_GRANULARITIES)}. Set granularity='tensor', or range='dynamic'."
            )
        if self.range == "previous" and self.granularity not in PREVIOUS_GRANULARITIES:
            raise ConfigError(
                f"range is 'previous' with granularity {self.granularity!r}; allowed are "
                f"{' and '.join(PREVIOUS_GRANULARITIES)}. Set granularity='sample', or range='dynamic'."
            )
        integer("timestep_buckets", self.timestep_buckets, low=1)
        if self.range != "calibrated" and self.timestep_buckets > 1:
            raise ConfigError(
                f"timestep_buckets is {shown(self.timestep_buckets)}, but range is {self.range!r}, which is new in "
                "every evaluation. Set range='calibrated', or remove timestep_buckets."
            )
        if isinstance(self.clip, bool) or not isinstance(self.clip, (int, float)) or not 0 < self.clip <= 1:
            raise ConfigError(f"clip is {shown(self.clip)}; allowed is 0 < clip <= 1. Use 1.0 for the full range.")
        if self.granularity == "group":
            if self.group_size is None:
                raise ConfigError("granularity 'group' needs group_size. Set it, for example group_size=32.")
            integer("group_size", self.group_size, low=1)
        elif self.group_size is not None:
            raise ConfigError(
                f"group_size is {shown(self.group_size)} but granularity is {self.granularity!r}. "
                "Set granularity='group', or remove group_size."
            )
        self._check_scales()

    def _check_scales(self) -> None:
        member("scales", self.scales, get_args(Scales))
        if self.scales == "real":
            return
        if self.granularity != "sample_channel":
            raise ConfigError(
                f"scales is 'power_of_two' with granularity {self.granularity!r}; it exists for 'sample_channel' only. "
                "Set granularity='sample_channel', or scales='real'."
            )
        if self.spare_bits < 1:
            raise ConfigError(
                f"scales is 'power_of_two' with bits={self.bits}: such codes fill their container of 8 bits, and no "
                f"exponent fits beside them. Use at most {7 if self.symmetric else 6} bits, or granularity='sample' "
                "with scales='real'."
            )

    @property
    def margin(self) -> float:
        """By how much the range of the evaluation before is widened: finer codes leave more room to be wasted.

        >>> QuantSpec(8).margin, QuantSpec(4).margin
        (1.25, 1.125)
        """
        return 1 + self.bits / 32

    @property
    def spare_bits(self) -> int:
        """Bits that the container of 8 leaves for exponents: E, the largest exponent of ``power_of_two`` scales.

        >>> [QuantSpec(bits).spare_bits for bits in (2, 4, 7)]
        [6, 4, 1]
        >>> [QuantSpec(bits, symmetric=False).spare_bits for bits in (2, 4, 6)]
        [5, 3, 1]
        """
        return (8 if self.symmetric else 7) - self.bits

    @property
    def code_range(self) -> tuple[int, int]:
        """Lowest and highest code.

        >>> QuantSpec(bits=4).code_range, QuantSpec(bits=4, symmetric=False).code_range
        ((-7, 7), (0, 15))
        """
        if self.symmetric:
            n = 2 ** (self.bits - 1) - 1
            return -n, n
        return 0, 2**self.bits - 1


MOST_ROUNDS = 100
"""Of an integer warm-up; after some ten of them what is left is rounding of floats."""


@dataclass(frozen=True)
class Modulation:
    """Quantize the change of an operator's input between evaluations (MoDiff; equations 6 to 14 of docs/method.md).

    Args:
        error_compensation: Take the difference to the reconstruction (equation 13); False only for ablations.
        warmup: First evaluation: ``full`` precision, or ``refine``: quantize a_T in ``warmup_rounds`` rounds.
        warmup_rounds: Rounds of ``refine``.
        refresh_every: Compute every n-th evaluation in full precision again; None: never. Counted in the cost.
        state_dtype: dtype in which an operator's output ô is kept; None: float32. ``bfloat16`` drifts and therefore
            needs ``refresh_every``.
        reconstruction_dtype: dtype in which the reconstruction â of an operator's input is kept; None: float32.
            ``int16`` keeps whole numbers of a step that the first evaluation decides, with room for inputs to grow to
            four times their range; scales are rounded to whole multiples of the step, so that â changes exactly.

    Both stay in float32 where a sample's input is one vector (time embeddings); â also where the input, and ô where the
    output, has at most a sixteenth of the other's channels (the image, at the denoiser's ends). That takes few bytes,
    and what is lost there shows in every pixel (benchmarks/state.md).

    Raises:
        ConfigError: A field is out of range, or fields contradict each other.
    """

    error_compensation: bool = True
    warmup: Warmup = "full"
    warmup_rounds: int = 3
    refresh_every: int | None = None
    state_dtype: StateDtype | None = None
    reconstruction_dtype: ReconstructionDtype | None = None

    def __post_init__(self) -> None:
        boolean("error_compensation", self.error_compensation)
        member("warmup", self.warmup, get_args(Warmup))
        integer("warmup_rounds", self.warmup_rounds, low=1, high=MOST_ROUNDS)
        if self.refresh_every is not None:
            integer("refresh_every", self.refresh_every, low=2)
        if self.state_dtype is not None:
            member("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.reconstruction_dtype is not None:
            member("reconstruction_dtype", self.reconstruction_dtype, get_args(ReconstructionDtype))
        if self.state_dtype == "bfloat16" and self.refresh_every is None:
            raise ConfigError(
                "state_dtype 'bfloat16' lets ô drift away from A(â). Set refresh_every, or use 'float16' or 'float32'."
            )
        if not self.error_compensation and self.warmup == "refine":
            raise ConfigError("warmup 'refine' needs error_compensation. Use warmup='full'.")


def check_range(spec: QuantSpec, modulation: Modulation | None) -> None:
    """Refuse ranges of the evaluation before where nothing is kept of it, or where it cannot be undone.

    Raises:
        ConfigError: The operator is not modulated, or without error compensation.
    """
    if spec.range != "previous":
        return
    if modulation is None:
        raise ConfigError(
            "range is 'previous', but the operator is not modulated: plain quantization keeps nothing between "
            "evaluations, so that each sample is quantized by itself. Use range='dynamic', or add a modulation."
        )
    if not modulation.error_compensation:
        raise ConfigError(
            "range 'previous' needs error_compensation: without it the last input is kept in place of â, and codes "
            "that do not fit could not be made again. Use range='dynamic'."
        )


def check_weight(spec: QuantSpec) -> None:
    """Refuse what exists for activations only."""
    if spec.granularity not in WEIGHT_GRANULARITIES:
        raise ConfigError(f"weight granularity is {spec.granularity!r}; allowed are {', '.join(WEIGHT_GRANULARITIES)}.")
    if spec.range != "dynamic":
        raise ConfigError(f"weight range is {spec.range!r}; a weight's range is its own. Use 'dynamic'.")
