"""The rows of the CIFAR-10 comparison: what is measured, in which order, and the paper's figure beside each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ARMS = ("ptq", "modiff", "modiff_no_compensation")
BITS = (8, 6, 4, 3, 2)
WEIGHTS = (8, 4)
SEEDS = (0, 1, 2)
OTHER_GRANULARITIES = ("channel", "tensor", "sample_channel")
REFRESH = 10
"""Every tenth evaluation in full precision: what an earlier version of the reference code did unsaid (trap 3)."""

WEIGHT_METHODS = {8: "nearest", 4: "gptq"}
"""How the weights of so many bits are found: W8 loses next to nothing by rounding to nearest."""

RECIPES = "recipes/cifar10"
IMAGES = {"small": 2048, "large": 5000}
BATCH = 256

# Published FID of 50,000 images, DDIM 100 quadratic (docs/method.md), by W, A, granularity: (plain, + MoDiff).
# None: not published. "sample" is the paper's dynamic per-image quantizer, "tensor" its dynamic tensor-wise one.
PAPER_100: dict[tuple[int, int | None, str], tuple[float | None, float | None]] = {
    (8, None, "sample"): (4.24, None),
    (8, 8, "sample"): (4.21, 4.10),
    (8, 6, "sample"): (4.15, 4.21),
    (8, 4, "sample"): (24.09, 4.31),
    (8, 3, "sample"): (143.4, 4.14),
    (8, 2, "sample"): (429.6, None),
    (4, None, "sample"): (5.09, None),
    (4, 8, "sample"): (4.96, 4.95),
    (4, 6, "sample"): (4.49, 5.01),
    (4, 4, "sample"): (22.50, 5.10),
    (4, 3, "sample"): (146.3, 4.98),
    (8, 8, "tensor"): (4.19, 4.21),
    (8, 6, "tensor"): (9.93, 4.00),
    (8, 4, "tensor"): (306.1, 28.19),
    (8, 2, "tensor"): (457.3, 186.0),
}
# The same with 20 steps; published tensor-wise only.
PAPER_20: dict[tuple[int, int | None, str], tuple[float | None, float | None]] = {
    (8, 8, "tensor"): (6.93, 6.90),
    (8, 6, "tensor"): (20.28, 6.75),
    (8, 4, "tensor"): (297.2, 22.1),
}


@dataclass(frozen=True)
class Row:
    """One evaluation of a student.

    Args:
        teacher: ``small`` or ``large``.
        weight_bits: Bits of the weights.
        activation_bits: Bits of the activations; None: untouched (the paper's full-precision row).
        arm: One of :data:`ARMS`.
        granularity: Of the activations.
        refresh_every: Full-precision refreshes, or None.
        steps: Quadratic DDIM steps.
        seed: Of the noise.
    """

    teacher: str
    weight_bits: int
    activation_bits: int | None
    arm: str
    granularity: str
    refresh_every: int | None
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """The configuration, without teacher, steps and seed: also the recipe's name, where it has one.

        >>> Row("small", 8, 4, "modiff", "tensor", None, 100, 0).name
        'w8a4_modiff_tensor'
        """
        name = f"w{self.weight_bits}a{self.activation_bits or 32}_{self.arm}"
        name += "" if self.granularity == "sample" else f"_{self.granularity}"
        return name + (f"_refresh{self.refresh_every}" if self.refresh_every else "")

    @property
    def id(self) -> str:
        """Unique name."""
        return f"{self.teacher}/steps{self.steps}/seed{self.seed}/{self.name}"

    @property
    def weight_method(self) -> str:
        """How the weights are found."""
        return WEIGHT_METHODS[self.weight_bits]

    @property
    def paper_fid(self) -> float | None:
        """The published FID of this configuration; None where there is none."""
        if self.refresh_every is not None or self.arm == "modiff_no_compensation":
            return None
        table = {100: PAPER_100, 20: PAPER_20}.get(self.steps, {})
        plain, modulated = table.get((self.weight_bits, self.activation_bits, self.granularity), (None, None))
        return plain if self.arm == "ptq" else modulated

    @property
    def recipe(self) -> str:
        """The recipe that the row starts from."""
        bits = 8 if self.activation_bits is None else self.activation_bits
        return f"{RECIPES}/w{self.weight_bits}a{bits}_{self.arm}.yaml"

    def options(self) -> list[str]:
        """What the row changes in its recipe."""
        found = ["--model.steps", str(self.steps), "--seed", str(self.seed)]
        if self.activation_bits is None:
            found += ["--model.preset", f"w{self.weight_bits}a32-ptq-paper"]
        if self.granularity != "sample":
            found += ["--model.config.activation.granularity", self.granularity]
        if self.refresh_every is not None:
            found += ["--model.config.modulation.refresh_every", str(self.refresh_every)]
        return found

    def facts(self) -> dict[str, Any]:
        """All of it, for the JSON."""
        return {"id": self.id, **asdict(self), "weight_method": self.weight_method, "paper_fid": self.paper_fid}


def small_rows() -> list[Row]:
    """The small teacher, seed by seed, so that a session that ends early leaves whole tables; 100 steps first."""
    found = []
    for seed in SEEDS:
        for steps in (100, 20):
            for weight in WEIGHTS:
                found.append(Row("small", weight, None, "ptq", "sample", None, steps, seed))
                found += [Row("small", weight, a, arm, "sample", None, steps, seed) for a in BITS for arm in ARMS]
            for granularity in OTHER_GRANULARITIES:
                for bits in (4, 3):
                    found += [Row("small", 8, bits, arm, granularity, None, steps, seed) for arm in ("modiff", "ptq")]
            for weight in WEIGHTS:
                found.append(Row("small", weight, 3, "modiff", "sample", REFRESH, steps, seed))
    return found


def large_rows() -> list[Row]:
    """The large teacher: W8, per sample, 100 steps, one seed; full precision, A4, A3, A6, A8, modulated first."""
    found = [Row("large", 8, None, "ptq", "sample", None, 100, 0)]
    for bits in (4, 3, 6, 8):
        found += [Row("large", 8, bits, arm, "sample", None, 100, 0) for arm in ("modiff", "ptq")]
    return [*found, Row("large", 8, 3, "modiff", "sample", REFRESH, 100, 0)]


def all_rows() -> list[Row]:
    """Every row, the small teacher first."""
    return small_rows() + large_rows()
