"""What became of the operators of a denoiser, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from modiff.config.specs import Modulation, QuantSpec


@dataclass(frozen=True)
class Row:
    """What became of one operator.

    Args:
        name: Qualified name; of a module registered under several names, the first.
        type: Class of the original.
        weight: Its weight spec, None for full precision.
        activation: Its activation spec, None for full precision.
        modulation: None: plain quantization.
        rule: Pattern of the rule that matched last, None where the config's own fields apply.
        skipped: Why it was left untouched; None where it was quantized.
        constant: Its input was constant throughout the last trajectory, so it was computed once in each context.
        uncalled: It was never called in the last trajectory: its input was not quantized.
        backend: Its execution and, where that is not in integers, why.
        special: ``vector``: it reads one vector per sample; ``end``: it is the denoiser's first or last operator;
            ``undecided``: what it reads is not known before the first evaluation.
    """

    name: str
    type: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    modulation: Modulation | None = None
    rule: str | None = None
    skipped: str | None = None
    constant: bool = False
    uncalled: bool = False
    backend: str = ""
    special: str = ""


@dataclass(frozen=True)
class Description:
    """One row for every linear operator of a student; prints as a table.

    Args:
        rows: By operator.
        schedule: Which blocks a reuse schedule skips, and when; empty where there is none.
    """

    rows: tuple[Row, ...]
    schedule: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [
            ("operator", "type", "weight", "activation", "modulation", "backend", "special", "rule", "skipped because")
        ]
        cells += [
            (
                row.name,
                row.type,
                "" if row.skipped else _spec_text(row.weight),
                "" if row.skipped else ("never called" if row.uncalled else _spec_text(row.activation)),
                ""
                if row.skipped
                else _modulation_text(row.modulation) + row.constant * ", constant input: computed once",
                row.backend,
                row.special,
                row.rule or "",
                row.skipped or "",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, *([self.schedule] if self.schedule else [])])


def _spec_text(spec: QuantSpec | None) -> str:
    if spec is None:
        return "full precision"
    parts = [f"{spec.bits} bit", spec.granularity, "symmetric" if spec.symmetric else "asymmetric"]
    if spec.scales == "power_of_two":
        parts.append("scales in powers of two")
    if spec.clip != 1:
        parts.append(f"clip {spec.clip:g}")
    if spec.range == "previous":
        parts.append("range of the evaluation before")
    if spec.range == "calibrated":
        parts.append(f"calibrated in {spec.timestep_buckets} buckets" if spec.timestep_buckets > 1 else "calibrated")
    return ", ".join(parts)


def _modulation_text(modulation: Modulation | None) -> str:
    if modulation is None:
        return "none"
    parts = ["compensated" if modulation.error_compensation else "uncompensated", f"{modulation.warmup} warm-up"]
    if modulation.refresh_every:
        parts.append(f"refresh every {modulation.refresh_every}")
    return ", ".join(parts)
