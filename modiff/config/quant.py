"""What is quantized, and how: plain frozen dataclasses, the same names in Python and YAML."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from modiff.errors import ConfigError

_Built = TypeVar("_Built")

Granularity = Literal["tensor", "sample", "channel", "sample_channel", "token", "group"]
GRANULARITIES = ("tensor", "sample", "channel", "sample_channel", "token", "group")
WEIGHT_GRANULARITIES = ("tensor", "channel", "group")
CALIBRATED_GRANULARITIES = ("tensor", "channel", "group")
STATE_DTYPES = ("float32", "float16", "bfloat16")


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
            ``channel`` or ``group``: the others have as many scales as the batch has rows. The integer warm-up
            ``refine`` stays dynamic.
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
    range: Literal["dynamic", "calibrated"] = "dynamic"
    clip: float = 1.0
    group_size: int | None = None
    timestep_buckets: int = 1
    scales: Literal["real", "power_of_two"] = "real"

    def __post_init__(self) -> None:
        _integer("bits", self.bits, low=2, high=8, hint="; for full precision set the whole spec to null")
        _member("granularity", self.granularity, GRANULARITIES)
        _boolean("symmetric", self.symmetric)
        _member("range", self.range, ("dynamic", "calibrated"))
        if self.range == "calibrated" and self.granularity not in CALIBRATED_GRANULARITIES:
            raise ConfigError(
                f"range is 'calibrated' with granularity {self.granularity!r}, whose scales belong to rows of a batch; "
                f"allowed are {', '.join(CALIBRATED_GRANULARITIES)}. Set granularity='tensor', or range='dynamic'."
            )
        _integer("timestep_buckets", self.timestep_buckets, low=1)
        if self.range == "dynamic" and self.timestep_buckets > 1:
            raise ConfigError(
                f"timestep_buckets is {self.timestep_buckets}, but range is 'dynamic', which is new in every "
                "evaluation. Set range='calibrated', or remove timestep_buckets."
            )
        if isinstance(self.clip, bool) or not isinstance(self.clip, (int, float)) or not 0 < self.clip <= 1:
            raise ConfigError(f"clip is {self.clip!r}; allowed is 0 < clip <= 1. Use 1.0 for the full range.")
        if self.granularity == "group":
            if self.group_size is None:
                raise ConfigError("granularity 'group' needs group_size. Set it, for example group_size=32.")
            _integer("group_size", self.group_size, low=1)
        elif self.group_size is not None:
            raise ConfigError(
                f"group_size is {self.group_size} but granularity is {self.granularity!r}. "
                "Set granularity='group', or remove group_size."
            )
        self._check_scales()

    def _check_scales(self) -> None:
        _member("scales", self.scales, ("real", "power_of_two"))
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


@dataclass(frozen=True)
class Modulation:
    """Quantize the change of an operator's input between evaluations (MoDiff; equations 6 to 14 of METHOD.md).

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
    warmup: Literal["full", "refine"] = "full"
    warmup_rounds: int = 3
    refresh_every: int | None = None
    state_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    reconstruction_dtype: Literal["float32", "int16"] | None = None

    def __post_init__(self) -> None:
        _boolean("error_compensation", self.error_compensation)
        _member("warmup", self.warmup, ("full", "refine"))
        _integer("warmup_rounds", self.warmup_rounds, low=1)
        if self.refresh_every is not None:
            _integer("refresh_every", self.refresh_every, low=2)
        if self.state_dtype is not None:
            _member("state_dtype", self.state_dtype, STATE_DTYPES)
        if self.reconstruction_dtype is not None:
            _member("reconstruction_dtype", self.reconstruction_dtype, ("float32", "int16"))
        if self.state_dtype == "bfloat16" and self.refresh_every is None:
            raise ConfigError(
                "state_dtype 'bfloat16' lets ô drift away from A(â). Set refresh_every, or use 'float16' or 'float32'."
            )
        if not self.error_compensation and self.warmup == "refine":
            raise ConfigError("warmup 'refine' needs error_compensation. Use warmup='full'.")


@dataclass(frozen=True)
class Rule:
    """An exception for the operators whose qualified name matches ``pattern``; the last matching rule wins.

    Args:
        pattern: A glob on the qualified module name (``down_blocks.*.conv1``), or ``re:`` and a regular expression.
        weight: A spec replaces the whole weight spec, None means full precision, ``"inherit"`` the config's own.
        activation: Likewise for activations.
        modulation: Likewise for modulation; None: plain quantization.
        skip: Leave the operator untouched.
        type: Apply to ``linear`` or ``conv`` operators only, or to ``any``.
    """

    pattern: str
    weight: QuantSpec | None | Literal["inherit"] = "inherit"
    activation: QuantSpec | None | Literal["inherit"] = "inherit"
    modulation: Modulation | None | Literal["inherit"] = "inherit"
    skip: bool = False
    type: Literal["any", "linear", "conv"] = "any"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(
                f"pattern is {self.pattern!r}; give a glob on module names, such as 'conv_in' or '*.to_q'."
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise ConfigError(f"pattern {self.pattern!r} is not a regular expression: {error}.") from error
        _side("weight", self.weight, QuantSpec, allow_inherit=True)
        _side("activation", self.activation, QuantSpec, allow_inherit=True)
        _side("modulation", self.modulation, Modulation, allow_inherit=True)
        _boolean("skip", self.skip)
        _member("type", self.type, ("any", "linear", "conv"))
        if isinstance(self.weight, QuantSpec):
            _weight_granularity(self.weight)

    def matches(self, name: str, kind: str) -> bool:
        """Whether the rule applies to operator ``name`` of ``kind`` (``linear`` or ``conv``)."""
        return self.type in ("any", kind) and self.names(name)

    def names(self, name: str) -> bool:
        """Whether the pattern matches, whatever the operator's type.

        >>> Rule("mid_block.*").names("mid_block.conv1"), Rule("re:conv_(in|out)").names("conv_in")
        (True, True)
        """
        if self.pattern.startswith("re:"):
            return re.fullmatch(self.pattern[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Special:
    """What operators of a special kind get in place of the config's own specs; a rule that matches one still wins.

    Args:
        weight: A spec replaces the whole weight spec, None means full precision, ``"inherit"`` the config's own.
        activation: Likewise for activations.
        names: The operators; None: found when the student is made, from the structure of diffusers' networks or from
            ``quantize(..., example_inputs=)``, else in the first evaluation, which decides for activations only.

    Raises:
        ConfigError: A field is of the wrong kind.
    """

    weight: QuantSpec | None | Literal["inherit"] = "inherit"
    activation: QuantSpec | None | Literal["inherit"] = "inherit"
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _side("weight", self.weight, QuantSpec, allow_inherit=True)
        _side("activation", self.activation, QuantSpec, allow_inherit=True)
        if isinstance(self.weight, QuantSpec):
            _weight_granularity(self.weight)
        if self.names is not None:
            if not isinstance(self.names, (list, tuple)) or not all(isinstance(name, str) for name in self.names):
                raise ConfigError(f"names is {self.names!r}; give a list of qualified names of operators, or None.")
            object.__setattr__(self, "names", tuple(self.names))


@dataclass(frozen=True)
class Split:
    """An operator whose input is a concatenation along channels, quantized in two halves (Q-Diffusion).

    Args:
        name: Its qualified module name; the halves are ``<name>.first`` and ``<name>.second``, and rules for ``name``
            apply to both.
        at: Input channels of the first half.

    Raises:
        ConfigError: A field is of the wrong kind.
    """

    name: str
    at: int

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"name is {self.name!r}; give the qualified name of an operator.")
        _integer("at", self.at, low=1)


@dataclass(frozen=True)
class QuantConfig:
    """A whole quantization: what every Linear and Conv gets, and the exceptions.

    Args:
        weight: Weight spec; None leaves weights in full precision.
        activation: Activation spec; None leaves activations in full precision.
        modulation: How differences are quantized; None: plain quantization of the inputs, the baseline.
        rules: Exceptions by module name; the last match wins, a pattern that matches nothing is an error.
        splits: Operators that are quantized in two halves; see :func:`modiff.calibration.prepare.inputs.find_splits`.
        smoothed: Linears whose input channels are divided by calibrated factors (SmoothQuant); a calibration with
            ``smoothing`` fills it in. Their parts are named ``<name>.inner``.
        vectors: What operators get that read one vector per sample (embeddings of time and class, and their
            projections): few products, but an error there is the same at every place of an image. None: nothing else.
        ends: What the denoiser's first and last operator get, which read the image and write the answer.
        backend: ``simulate``: floating point on quantized values, the definition. ``onednn``: integer products on the
            CPU, refused where an operator's could not be exact. ``auto``: integers where they are exact, else
            ``simulate``; :func:`modiff.describe` says which, and why.

    Raises:
        ConfigError: A field is wrong.
    """

    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    modulation: Modulation | None = None
    rules: tuple[Rule, ...] = field(default=())
    splits: tuple[Split, ...] = field(default=())
    smoothed: tuple[str, ...] = field(default=())
    vectors: Special | None = None
    ends: Special | None = None
    backend: Literal["auto", "simulate", "onednn"] = "auto"

    def __post_init__(self) -> None:
        _side("weight", self.weight, QuantSpec)
        _side("activation", self.activation, QuantSpec)
        _side("modulation", self.modulation, Modulation)
        _side("vectors", self.vectors, Special)
        _side("ends", self.ends, Special)
        if isinstance(self.rules, list):
            object.__setattr__(self, "rules", tuple(self.rules))
        if not isinstance(self.rules, tuple) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise ConfigError(f"rules is {self.rules!r}; give a list of Rule.")
        for name, kind in (("splits", Split), ("smoothed", str)):
            given = getattr(self, name)
            if not isinstance(given, (list, tuple)) or not all(isinstance(member, kind) for member in given):
                raise ConfigError(f"{name} is {given!r}; give a list of {kind.__name__}.")
            object.__setattr__(self, name, tuple(given))
        _member("backend", self.backend, ("auto", "simulate", "onednn"))
        if self.weight is not None:
            _weight_granularity(self.weight)

    @classmethod
    def preset(cls, name: str) -> QuantConfig:
        """A config by name: ``w{bits}a{bits}-modiff`` or ``-ptq``; bits 2 to 8, or 32 for untouched.

        They are the best known settings at those bits, the same for both arms but for the modulation, and change when
        better ones are measured (CHANGELOG, Numerics). ``w{bits}a{bits}-modiff-paper`` and ``-ptq-paper`` keep the
        paper's protocol: every operator at the named bits, weights per output channel and symmetric, activations per
        sample; plain ones asymmetric, residuals asymmetric below 6 bits.

        >>> spec = QuantConfig.preset("w8a4-modiff").activation
        >>> spec.bits, spec.granularity, spec.scales, spec.symmetric
        (4, 'sample_channel', 'power_of_two', False)
        >>> QuantConfig.preset("w8a4-modiff").vectors.activation.bits
        8
        >>> QuantConfig.preset("w8a4-modiff-paper").activation.granularity
        'sample'

        Raises:
            ConfigError: The name is not of that form.
        """
        form = "w([2-8]|32)a([2-8]|32)-(modiff|ptq)(-paper)?"
        match = re.fullmatch(form, name) if isinstance(name, str) else None
        if not match:
            raise ConfigError(
                f"unknown preset {name!r}; allowed are w{{bits}}a{{bits}}-modiff and w{{bits}}a{{bits}}-ptq "
                "with bits 2 to 8 or 32, for example 'w8a4-modiff', and the same with -paper at the end."
            )
        weight, activation = int(match[1]), int(match[2])
        modulated = match[3] == "modiff"
        modulation = Modulation() if modulated else None
        if match[4]:
            symmetric = modulated and activation >= 6
            return cls(
                weight=None if weight == 32 else QuantSpec(weight, "channel"),
                activation=None if activation == 32 else QuantSpec(activation, "sample", symmetric=symmetric),
                modulation=modulation,
            )
        eight = QuantSpec(8, "channel"), QuantSpec(8, "sample", symmetric=modulated)
        part = Special(
            weight=eight[0] if weight < 8 else "inherit", activation=eight[1] if activation < 8 else "inherit"
        )
        plain = Special() == part
        return cls(
            weight=None if weight == 32 else QuantSpec(weight, "channel", symmetric=weight >= 5),
            activation=_best_activation(activation, modulated),
            modulation=modulation,
            vectors=None if plain else part,
            ends=None if plain else part,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Build from plain dictionaries, as :func:`dataclasses.asdict` writes them.

        Raises:
            ConfigError: A field is unknown, missing or wrong; the message starts with where it stands.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"QuantConfig is {values!r}; give a mapping with its fields.")
        values = _build_sides(values)
        rules = values.get("rules")
        if isinstance(rules, (list, tuple)):
            values["rules"] = tuple(_build_part(f"rules[{i}]", Rule, rule) for i, rule in enumerate(rules))
        elif rules is None:
            values.pop("rules", None)
        for key in ("vectors", "ends"):
            if isinstance(values.get(key), dict):
                values[key] = _build_part(key, Special, values[key])
        splits = values.get("splits")
        if isinstance(splits, (list, tuple)):
            values["splits"] = tuple(_build(Split, s) if isinstance(s, dict) else s for s in splits)
        return _build(cls, values)


def _best_activation(bits: int, modulated: bool) -> QuantSpec | None:
    """The best known activation spec (benchmarks/bits.md)."""
    if bits == 32:
        return None
    if bits > 6:
        return QuantSpec(bits, "sample", symmetric=modulated)
    clip = 0.8 if bits == 2 and modulated else 1.0
    return QuantSpec(bits, "sample_channel", symmetric=False, clip=clip, scales="power_of_two")


def _build_part(where: str, kind: Callable[..., Any], values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    try:
        return _build(kind, _build_sides(values))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _build_sides(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    for key, kind in (("weight", QuantSpec), ("activation", QuantSpec), ("modulation", Modulation)):
        if isinstance(values.get(key), dict):
            try:
                values[key] = _build(kind, values[key])
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None
    return values


def _build(kind: Callable[..., _Built], values: dict[str, Any]) -> _Built:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = [f.name for f in fields]
    name = getattr(kind, "__name__", "")
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ConfigError(f"{name} has no field {unknown[0]!r}; allowed are {', '.join(known)}.")
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise ConfigError(f"{name} needs the field {missing[0]!r}. Set it.")
    return kind(**values)


def _side(name: str, value: object, kind: type, allow_inherit: bool = False) -> None:
    if value is None or isinstance(value, kind) or (allow_inherit and isinstance(value, str) and value == "inherit"):
        return
    inherit = ", 'inherit'" if allow_inherit else ""
    raise ConfigError(f"{name} is {value!r}; allowed are a {kind.__name__}{inherit} or None.")


def _weight_granularity(spec: QuantSpec) -> None:
    if spec.granularity not in WEIGHT_GRANULARITIES:
        raise ConfigError(f"weight granularity is {spec.granularity!r}; allowed are {', '.join(WEIGHT_GRANULARITIES)}.")
    if spec.range == "calibrated":
        raise ConfigError("weight range is 'calibrated'; a weight's range is its own. Use 'dynamic'.")


def _member(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; allowed are true and false.")


def _integer(name: str, value: object, low: int, high: int | None = None, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise ConfigError(f"{name} is {value!r}; allowed are whole numbers, {allowed}{hint}.")
