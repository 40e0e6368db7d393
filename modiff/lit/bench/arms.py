"""What ``modiff bench`` runs: the teacher and students, eager and compiled, at one batch size after another."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from modiff.compiling.modes import compile, fused_blocks, has_regions
from modiff.errors import ConfigError
from modiff.lit.bench.clocks import (
    Call,
    Inputs,
    Stages,
    fused_stages,
    interleave,
    peak_memory,
    spread,
    stages,
    synchronize,
)
from modiff.lit.bench.results import backends
from modiff.lit.modules.student import LitStudent
from modiff.operators.adapters import find_adapter
from modiff.student.cost import weight_bytes
from modiff.student.swap import describe, operators
from modiff.trajectory.session import trajectory

TEACHER = "teacher"
EAGER, COMPILED = "eager", "compiled"
CLOCKED = "medians of clocks around every operator and its product, scaled to the evaluation without clocks"
REMAINS = (
    "compiled, so that no clock can stand within: products as eager clocks say; the teacher's rest is what remains of "
    "its evaluation, a student's rest is the teacher's, its modulation what remains"
)
FUSED = (
    "clocks inside the C++ operators: products with what accumulates them; modulation with the norms and activations "
    "that run in the same pass; the rest is what remains"
)
BFLOAT16 = "teacher in bfloat16"
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
        """The name of the arm, unique among all arms of the bench."""
        return f"{self.mode}/{self.name}"

    @property
    def calls_operators(self) -> bool:
        """Whether the operators are called one by one, so that each can be timed, compiled stages or not."""
        if self.mode == EAGER:
            return True
        return self.student is not None and not has_regions(self.student)

    @property
    def limit(self) -> int | None:
        """Evaluations that the arm's ranges were calibrated for; None if a trajectory may have any length."""
        found = [] if self.student is None else operators(self.student).values()
        return min((o.calibrated.length for o in found if o.calibrated is not None), default=None)

    def bind(self, indices: Tensor) -> Call:
        """``denoiser(x, t)`` with the conditions of samples ``indices``."""
        return self.owner.bind(self.module, indices)  # type: ignore[arg-type]

    def trajectory(self) -> Any:
        """The context in which the arm runs: a new trajectory for a student, no context for a teacher."""
        return nullcontext() if self.student is None else trajectory(self.student)


class Warm:
    """An open trajectory of an arm beyond its first evaluations; a new one where the next turn would not fit.

    Args:
        arm: The arm.
        call: It, bound to its conditions.
        inputs: Of its evaluations.
        evaluations: Of a turn.

    Raises:
        ConfigError: A turn does not fit into trajectories of the length that the student was calibrated for.
    """

    def __init__(self, arm: Arm, call: Call, inputs: Inputs, evaluations: int) -> None:
        self.arm, self.call, self.inputs, self.limit = arm, call, inputs, arm.limit
        self.used, self.stack = 0, ExitStack()
        if self.limit is not None and WARM + evaluations > self.limit:
            raise ConfigError(
                f"{arm.name} is calibrated for trajectories of {self.limit} evaluations; {WARM} warm-ups and a turn of "
                f"{evaluations} are more. Give fewer --evaluations, or calibrate with more steps."
            )

    def __enter__(self) -> Warm:
        self._open()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def ready(self, evaluations: int) -> None:
        """Make sure that the open trajectory has room for ``evaluations`` more; open a new one if it has not."""
        if self.limit is not None and self.used + evaluations > self.limit:
            self.stack.close()
            self._open()
        self.used += evaluations

    def _open(self) -> None:
        self.stack.enter_context(self.arm.trajectory())
        for k in range(WARM):
            self.call(*self.inputs.at(k))
        self.used = WARM


@dataclass
class Bench:
    """Teacher and students in one process.

    Args:
        modules: One for each student, by name, in order; they share the teacher.
        modes: ``eager`` and ``compiled``, or one of them.
        device: Where everything runs.
        context: Makes the context of an evaluation, such as autocast.
        channels_last: The layout of x.
        compile_mode: As for :func:`modiff.compile`.
        bfloat16: Time the compiled teacher cast to bfloat16 as well.
        tell: Called with a line about what goes on.
    """

    modules: Mapping[str, LitStudent]
    modes: tuple[str, ...]
    device: torch.device
    context: Callable[[], Any] = nullcontext
    channels_last: bool = False
    compile_mode: str = "auto"
    bfloat16: bool = False
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
            bfloat16 = [_in_bfloat16(first)] if compiled and self.bfloat16 else []
            for name, module in self.modules.items():
                student = module.make_student() if compiled else module.student
                assert student is not None
                called = compile_student(student, self.compile_mode) if compiled else student
                self.arms.append(Arm(name, mode, called, module, student))
            self.arms += bfloat16

    @property
    def timed(self) -> list[Arm]:
        """The arms that are timed, in the order of a round."""
        return [arm for arm in self.arms if arm.mode in self.modes]

    def operators(self, arm: Arm) -> dict[str, nn.Module]:
        """The linear operators of an arm that calls them, those in full precision included."""
        names = [row.name for row in describe(self.arms[1].student) if row.type]  # type: ignore[arg-type]
        root = arm.owner.teacher if arm.student is None else arm.student
        assert root is not None
        original = self.arms[0].owner.teacher
        assert original is not None
        return {name: root.get_submodule(name) for name in names if _is_operator(original.get_submodule(name))}

    @torch.no_grad()
    def measure(self, batch_size: int, rounds: int, evaluations: int) -> list[dict[str, Any]]:
        """Measure one batch size and return one entry for each mode.

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
            for name in self.modules if BFLOAT16 in turns else ():
                arms[name]["ratio_to_bfloat16"] = summary(turns[name], turns[BFLOAT16])["ratio"]
            entries.append({"batch_size": batch_size, "mode": mode, TEACHER: teacher, "students": arms})
        for entry in entries:
            for name in self.modules:
                seen = found.get(f"{entry['mode']}/{name}") or found[f"{EAGER}/{name}"]
                entry["students"][name]["operators"] = [
                    {"name": n, "products_s": t.product, "modulation_s": t.forward - t.product}
                    for n, t in seen.operators.items()
                ]
        return entries

    def executed(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Which backend runs each operator, by student and mode."""
        students = [arm for arm in self.timed if arm.student is not None]
        return {
            name: {arm.mode: backends(describe(arm.student)) for arm in students if arm.name == name}  # type: ignore[arg-type]
            for name in self.modules
        }

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
        peak, how = peak_memory(lambda: run(min(WARM + 1, arm.limit or WARM + 1)), self.device)
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
        """Time evaluations inside of open trajectories, in seconds; the arms take turns."""
        calls = {arm.key: arm.bind(indices) for arm in self.timed}
        with ExitStack() as stack:
            runs = {a.key: stack.enter_context(Warm(a, calls[a.key], inputs, evaluations)) for a in self.timed}
            ready = lambda name: runs[name].ready(evaluations)  # noqa: E731
            return interleave(calls, inputs, rounds, evaluations, self.device, WARM, ready)

    def stages(self, indices: Tensor, inputs: Inputs, rounds: int) -> dict[str, Stages]:
        """Median times by stage for each arm whose operators can be timed one by one; the arms take turns."""
        clocked = [arm for arm in self.arms if arm.calls_operators]
        calls, modules = {a.key: a.bind(indices) for a in clocked}, {a.key: self.operators(a) for a in clocked}
        found: dict[str, list[Stages]] = {arm.key: [] for arm in clocked}
        with ExitStack() as stack:
            runs = {a.key: stack.enter_context(Warm(a, calls[a.key], inputs, 1)) for a in clocked}
            for turn in range(rounds):
                x, t = inputs.at(WARM + turn)
                for name, call in calls.items():
                    runs[name].ready(1)
                    found[name].append(stages(modules[name], lambda call=call: call(x, t), self.device))  # type: ignore[misc] # noqa: B023
                    if runs[name].arm.student is not None and fused_blocks(runs[name].arm.student):
                        runs[name].ready(1)
                        found[name][-1].fused = fused_stages(lambda call=call: call(x, t))  # type: ignore[misc] # noqa: B023
        return {name: Stages.median(values) for name, values in found.items()}


def _in_bfloat16(owner: LitStudent) -> Arm:
    """The teacher as a user of a processor with bfloat16 would run it."""
    assert owner.teacher is not None
    model = torch.compile(copy.deepcopy(owner.teacher).to(torch.bfloat16), dynamic=False)

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_to_bfloat16, (args, kwargs))
        output = model(x.to(torch.bfloat16), *args, **kwargs)
        return (output if isinstance(output, Tensor) else output[0]).to(x.dtype)

    return Arm(BFLOAT16, COMPILED, run, owner)


def _to_bfloat16(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 else x


def compile_student(student: nn.Module, mode: str) -> nn.Module:
    """Compile a student in place and return it."""
    return compile(student, mode)  # type: ignore[arg-type]


def staged(mode: str, turns: Mapping[str, list[list[float]]], found: Mapping[str, Stages]) -> dict[str, dict[str, Any]]:
    """Seconds by stage of each arm of one mode.

    Clocks cannot stand within compiled code. Where a denoiser, or its blocks, are compiled, the products are those of
    the eager arm (the same kernels), the teacher's rest is what remains of its evaluation, a student's rest is the
    teacher's, and its modulation is what then remains. A small negative figure is the noise of that subtraction.

    Args:
        mode: Of the arms.
        turns: Seconds of their evaluations, without clocks.
        found: Stages by mode and name, of the arms that clocks could stand in.
    """
    medians = {name: spread(flat(values))["median"] for name, values in turns.items()}
    products = found[f"{EAGER}/{TEACHER}"].products
    rest = medians[TEACHER] - products
    result = {}
    for name in turns:
        seen = found.get(f"{mode}/{name}")
        if seen is not None and seen.fused is not None:
            whole, before, products_inside = (medians[name] / seen.fused[0] * seconds for seconds in seen.fused)
            result[name] = _stage(products_inside, before, whole - before - products_inside, FUSED)
        elif seen is not None:
            scale = medians[name] / seen.whole
            result[name] = _stage(seen.products * scale, seen.modulation * scale, seen.rest * scale, CLOCKED)
        elif name == TEACHER:
            result[name] = _stage(products, 0.0, rest, REMAINS)
        elif name == BFLOAT16:
            result[name] = _stage(0.0, 0.0, medians[name], "compiled in another precision: not told apart")
        else:
            own = found[f"{EAGER}/{name}"].products
            result[name] = _stage(own, medians[name] - own - rest, rest, REMAINS)
    return result


def _stage(products: float, modulation: float, rest: float, how: str) -> dict[str, Any]:
    return {"products_s": products, "modulation_s": modulation, "rest_s": rest, "how": how}


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
