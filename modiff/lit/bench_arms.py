"""What ``modiff bench`` runs: the teacher and students, eager and compiled, at one batch size after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modiff.conversion import describe
from modiff.cost import weight_bytes
from modiff.errors import ConfigError
from modiff.layers.operators import find_adapter
from modiff.layers.state import trajectory
from modiff.lit.student import LitStudent
from modiff.lit.timing import Call, Inputs, Stages, interleave, peak_memory, spread, stages, synchronize

TEACHER = "teacher"
EAGER, COMPILED = "eager", "compiled"
WARM = 2  # evaluations before the clock starts: a compiled student makes a graph for the first and one for later ones


@dataclass
class Arm:
    """One denoiser of the bench.

    Args:
        name: ``teacher``, or the student's.
        mode: ``eager`` or ``compiled``.
        module: The denoiser that is called.
        owner: Whose conditions and guidance hold.
        student: The module that a trajectory is opened on; None: the teacher.
    """

    name: str
    mode: str
    module: Callable[..., Any]
    owner: LitStudent
    student: nn.Module | None = None

    @property
    def key(self) -> str:
        """Its name among all arms."""
        return f"{self.mode}/{self.name}"

    def bind(self, indices: Tensor) -> Call:
        """``denoiser(x, t)`` with the conditions of samples ``indices``."""
        return self.owner.bind(self.module, indices)  # type: ignore[arg-type]

    def trajectory(self) -> Any:
        """The context in which it runs: a new trajectory of a student, nothing for a teacher."""
        return nullcontext() if self.student is None else trajectory(self.student)


@dataclass
class Bench:
    """Teacher and students in one process.

    Args:
        modules: One for each student, by name, in order; they share the teacher.
        modes: ``eager`` and ``compiled``, or one of them.
        device: Where everything runs.
        context: Makes the context of an evaluation, such as autocast.
        channels_last: The layout of x.
        tell: Called with a line about what goes on.
    """

    modules: Mapping[str, LitStudent]
    modes: tuple[str, ...]
    device: torch.device
    context: Callable[[], Any] = nullcontext
    channels_last: bool = False
    tell: Callable[[str], None] = print
    arms: list[Arm] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = next(iter(self.modules.values()))
        assert first.teacher is not None
        # Eager arms are always there: clocks around operators, which tell the stages, need them.
        for mode in (EAGER, *(m for m in self.modes if m != EAGER)):
            compiled = mode == COMPILED
            teacher = torch.compile(first.teacher, dynamic=False) if compiled else first.teacher
            self.arms.append(Arm(TEACHER, mode, teacher, first))
            for name, module in self.modules.items():
                student = module.make_student() if compiled else module.student
                assert student is not None
                called = compile_student(student) if compiled else student
                self.arms.append(Arm(name, mode, called, module, student))

    @property
    def timed(self) -> list[Arm]:
        """The arms that are timed, in the order of a round."""
        return [arm for arm in self.arms if arm.mode in self.modes]

    def operators(self, arm: Arm) -> dict[str, nn.Module]:
        """The linear operators of an eager arm, those in full precision included."""
        names = [row.name for row in describe(self.arms[1].student) if row.type]  # type: ignore[arg-type]
        root = arm.owner.teacher if arm.student is None else arm.student
        assert root is not None
        original = self.arms[0].owner.teacher
        assert original is not None
        return {name: root.get_submodule(name) for name in names if _is_operator(original.get_submodule(name))}

    @torch.no_grad()
    def measure(self, batch_size: int, rounds: int, evaluations: int) -> list[dict[str, Any]]:
        """Everything about one batch size; one entry for each mode.

        Args:
            batch_size: Images of an evaluation.
            rounds: Turns of each arm.
            evaluations: Timed evaluations of a turn.
        """
        indices = torch.arange(batch_size)
        inputs = self.inputs(indices, WARM + rounds * evaluations)
        with self.context():
            facts = {arm.key: self.prepare(arm, indices, inputs) for arm in self.timed}
            times = self.time(indices, inputs, rounds, evaluations)
            found = self.stages(indices, inputs, max(3, rounds // 2))
        entries = []
        for mode in self.modes:
            turns = {arm.name: times[arm.key] for arm in self.timed if arm.mode == mode}
            stage = staged(mode, turns, found)
            arms = {
                name: {**facts[f"{mode}/{name}"], **summary(turns[name], turns[TEACHER]), "stages": stage[name]}
                for name in turns
            }
            teacher = arms.pop(TEACHER)
            del teacher["ratio"]
            entries.append({"batch_size": batch_size, "mode": mode, TEACHER: teacher, "students": arms})
        for name in self.modules:
            for entry in entries:
                entry["students"][name]["operators"] = [
                    {"name": n, "products_s": t.product, "modulation_s": t.forward - t.product}
                    for n, t in found[name].operators.items()
                ]
        return entries

    def inputs(self, indices: Tensor, count: int) -> Inputs:
        """The evaluations' inputs, the same for all arms."""
        owner = self.arms[0].owner
        assert owner.loaded is not None
        steps = int(owner.loaded.scheduler_config.get("num_train_timesteps", 1000))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        first, last = (owner.noise(indices, stream).contiguous(memory_format=layout) for stream in (0, 1))
        return Inputs(first, 0.5 * last, count, steps)

    def prepare(self, arm: Arm, indices: Tensor, inputs: Inputs) -> dict[str, Any]:
        """Warm up, compile; then time the first evaluation of a trajectory, and look at the memory of three."""
        call = arm.bind(indices)

        def run(count: int) -> float:
            with arm.trajectory():
                synchronize(self.device)
                start = time.perf_counter()
                call(*inputs.at(0))
                synchronize(self.device)
                first = time.perf_counter() - start
                for k in range(1, count):
                    call(*inputs.at(k))
                synchronize(self.device)
            return first

        start = time.perf_counter()
        run(WARM)
        warm = time.perf_counter() - start
        if arm.mode == COMPILED:
            self.tell(f"  {arm.name}: compiled in {warm:.1f} s, the first calls included")
        first = run(1)
        peak, how = peak_memory(lambda: run(WARM + 1), self.device)
        with arm.trajectory() as opened:
            call(*inputs.at(0))
            state = 0 if opened is None else opened.state_bytes
        root = arm.owner.teacher if arm.student is None else arm.student
        assert root is not None
        return {
            "compile_s": warm if arm.mode == COMPILED else None,
            "first_evaluation_s": first,
            "peak_memory_mib": peak,
            "peak_memory_is": how,
            "state_mib": state / 2**20,
            "stored_weight_mib": weight_bytes(root) / 2**20,
        }

    def time(self, indices: Tensor, inputs: Inputs, rounds: int, evaluations: int) -> dict[str, list[list[float]]]:
        """Seconds of evaluations within open trajectories, the arms in turns."""
        calls = {arm.key: arm.bind(indices) for arm in self.timed}
        with ExitStack() as stack:
            for arm in self.timed:
                stack.enter_context(arm.trajectory())
                for k in range(WARM):
                    calls[arm.key](*inputs.at(k))
            return interleave(calls, inputs, rounds, evaluations, self.device, WARM)

    def stages(self, indices: Tensor, inputs: Inputs, rounds: int) -> dict[str, Stages]:
        """Evaluations of each eager arm by stage, medians; the arms in turns."""
        eager = [arm for arm in self.arms if arm.mode == EAGER]
        calls, operators = {a.name: a.bind(indices) for a in eager}, {a.name: self.operators(a) for a in eager}
        found: dict[str, list[Stages]] = {arm.name: [] for arm in eager}
        with ExitStack() as stack:
            for arm in eager:
                stack.enter_context(arm.trajectory())
                for k in range(WARM):
                    calls[arm.name](*inputs.at(k))
            for turn in range(rounds):
                x, t = inputs.at(WARM + turn)
                for name, call in calls.items():
                    found[name].append(stages(operators[name], lambda call=call: call(x, t), self.device))  # type: ignore[misc] # noqa: B023
        return {name: Stages.median(values) for name, values in found.items()}


def compile_student(student: nn.Module) -> Callable[..., Any]:
    """The compiled student."""
    import modiff

    return modiff.compile(student) if hasattr(modiff, "compile") else student


def staged(mode: str, turns: Mapping[str, list[list[float]]], found: Mapping[str, Stages]) -> dict[str, dict[str, Any]]:
    """Seconds by stage of each arm of one mode.

    Clocks cannot stand within compiled code. There the products are those of the eager arm (the same kernels), the
    teacher's rest is what remains of its evaluation, a student's rest is the teacher's, and its modulation is what then
    remains. A small negative figure is the noise of that subtraction.
    """
    medians = {name: spread(flat(values))["median"] for name, values in turns.items()}
    if mode == EAGER:
        how = "clocks around every operator and its product, medians; scaled to the evaluation without clocks"
        scale = {name: medians[name] / found[name].whole for name in turns}
        return {
            name: _stage(found[name].products, found[name].modulation, found[name].rest, scale[name], how)
            for name in turns
        }
    how = "products: clocks in eager mode; rest: the compiled teacher without its products; modulation: what remains"
    rest = medians[TEACHER] - found[TEACHER].products
    result = {}
    for name in turns:
        products = found[name].products
        modulation = 0.0 if name == TEACHER else medians[name] - products - rest
        result[name] = _stage(products, modulation, rest, 1.0, how)
    return result


def _stage(products: float, modulation: float, rest: float, scale: float, how: str) -> dict[str, Any]:
    values = {"products_s": products, "modulation_s": modulation, "rest_s": rest}
    return {**{key: value * scale for key, value in values.items()}, "how": how}


def summary(turns: list[list[float]], teacher: list[list[float]]) -> dict[str, Any]:
    """Spread of the seconds, and of the ratio teacher / student of each round."""
    ratios = [spread(t)["median"] / spread(s)["median"] for t, s in zip(teacher, turns, strict=True)]
    return {"seconds": {**spread(flat(turns)), "values": turns}, "ratio": spread(ratios)}


def flat(turns: list[list[float]]) -> list[float]:
    """All evaluations of all turns."""
    return [value for turn in turns for value in turn]


def _is_operator(module: nn.Module) -> bool:
    try:
        return find_adapter(module) is not None
    except ConfigError:
        return False
