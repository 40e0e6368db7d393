"""What every metric declares, and the registry in which an evaluation finds all of them.

To add a metric, write a :class:`Measure` with its :class:`Figure` and decorate it with :func:`measure`. It then appears
in ``metrics.json``, in tables, in the report, in the CSV log and in W&B; nothing else has to know of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn

from modiff.errors import ConfigError
from modiff.metrics.statistics import FeatureStatistics

Source = Literal["teacher", "student"]


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation, as tables, pages and dashboards show it.

    Args:
        name: Its key below ``student`` (and ``teacher``) in ``metrics.json``, such as ``psnr_db``.
        label: What it is called on pages and in tables.
        unit: Such as ``dB``; empty for a pure number.
        better: Whether higher or lower values are better; None where neither is.
        of: Whose images have it.
        column: Heading of its column in tables of several recipes, lines separated by newlines; empty: no column.
        order: Place among the columns, and among the rows of the report; smaller comes first.
        digits: Significant digits that are shown.
        network: Key in ``features`` of the network that it was measured with; empty: none.
        reason: Why it is missing, where the measure does not give a reason of its own.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    of: tuple[Source, ...] = ("student",)
    column: str = ""
    order: int = 100
    digits: int = 4
    network: str = ""
    reason: str = "it was not measured"

    @property
    def title(self) -> str:
        """Label and unit.

        >>> Figure("psnr_db", "PSNR", unit="dB").title
        'PSNR, dB'
        """
        return f"{self.label}, {self.unit}" if self.unit else self.label


@dataclass(frozen=True)
class Setting:
    """What a measure may know before the first image.

    Args:
        image_shape: ``(C, H, W)`` of the images.
        features: Path of the feature network; None: there is none.
        statistics: Its statistics of real images; None: there are none.
        prompted: Whether the teacher draws from prompts.
        clip: CLIP model that the recipe asks for; None: the usual one, where it is on this machine.
    """

    image_shape: tuple[int, int, int]
    features: Any = None
    statistics: FeatureStatistics | None = None
    prompted: bool = False
    clip: str | None = None


@dataclass(frozen=True)
class ImagePairs:
    """Images of teacher and student from the same noise; N may be 0.

    Args:
        teacher: Float ``[N, C, H, W]``, clamped to [0, 1].
        student: The same.
        teacher_raw: ``[N, C, H, W]`` in the model's own range, not clamped.
        student_raw: The same.
        index: Sample indices ``[N]``.
        conditions: Prompts or classes of the samples; None where they have none.
    """

    teacher: Tensor
    student: Tensor
    teacher_raw: Tensor
    student_raw: Tensor
    index: Tensor
    conditions: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass
class Findings:
    """What measures found, by the dotted keys of ``metrics.json``.

    Args:
        values: Such as ``student.psnr_db``; None where a figure cannot be given.
        reasons: For each figure that is None or absent: why.
        features: Names and sizes of the networks that figures were measured with.
    """

    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Findings) -> Findings:
        return Findings(self.values | other.values, self.reasons | other.reasons, self.features | other.features)


class Measure(nn.Module):
    """Computes one or more figures from all images of an evaluation, over all ranks.

    Attributes:
        figures: What it computes.
    """

    figures: ClassVar[tuple[Figure, ...]] = ()

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting

    @abstractmethod
    def update(self, images: ImagePairs) -> None:
        """Take the images of a batch. Every rank calls it as often, also without images."""

    @abstractmethod
    def compute(self) -> Findings:
        """The figures over all ranks. A figure that cannot be given is None or absent, and has a reason."""


_M = TypeVar("_M", bound=type[Measure])
MEASURES: dict[str, type[Measure]] = {}


def measure(cls: _M) -> _M:
    """Register a measure.

    Raises:
        ConfigError: A figure of it is declared already.
    """
    taken = {figure.name for figure in all_figures()} & {figure.name for figure in cls.figures}
    if cls.__name__ in MEASURES or taken:
        what = f"figure {min(taken)!r}" if taken else f"measure {cls.__name__!r}"
        raise ConfigError(f"The {what} is declared twice. Give each figure one measure and a name of its own.")
    MEASURES[cls.__name__] = cls
    return cls


def all_figures() -> Iterator[Figure]:
    """Every declared figure, in its order."""
    yield from sorted((f for cls in MEASURES.values() for f in cls.figures), key=lambda figure: figure.order)
