"""``modiff.compile``: the parts of a student that ``torch.compile`` makes faster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from modiff.compiling.bfloat16 import Bfloat16
from modiff.compiling.blocks import kind_of
from modiff.compiling.choose import Measured, chains_of, use_float
from modiff.compiling.fusion import Fusion, fuses
from modiff.compiling.graphs import require_recordable, use_graphs
from modiff.compiling.probe import missing_compiler
from modiff.compiling.regions import CompiledForward, Regions
from modiff.errors import ConfigError
from modiff.kernels.compiled import RECOMPILES, compiled_backend
from modiff.kernels.cpp import build
from modiff.operators.quantized import QuantizedOperator
from modiff.student.blocks import repeated_blocks
from modiff.student.reuse import reuse_of
from modiff.student.swap import operators
from modiff.trajectory.session import state_of

log = logging.getLogger("modiff")

Mode = Literal["auto", "fused", "stages", "blocks", "whole"]
MODES: tuple[Mode, ...] = get_args(Mode)


def compile(  # noqa: A001 (modiff.compile)
    student: nn.Module,
    mode: Mode = "auto",
    choose: Literal["measured"] | Sequence[str] | None = None,
    compute_dtype: Literal["bfloat16"] | None = None,
    cuda_graph: bool = False,
) -> nn.Module:
    """Compile a student, in place; it is compiled when it is first called.

    ``fused`` (on an x86 CPU): each operator is one C++ call, built once on this machine (less than 90 s), and takes the
    norms, activations and residual additions of known blocks into its passes over memory
    (:mod:`modiff.compiling.blocks`), modulated or plain; on an NVIDIA GPU, Triton's kernels take norms and activations
    of modulated ones. ``stages``: only the element-wise stages around each product (difference, range, codes,
    reconstruction; scale and add), once for all operators and shapes: seconds. ``blocks``: each repeated block.
    ``whole``: the denoiser as one graph (``fullgraph=True`` where it allows that). In the last two the first evaluation
    of a trajectory and refreshes run eagerly; all others share one graph for each shape. ``auto`` takes the fastest of
    them where measured (``benchmarks/peers.md``, ``benchmarks/cpu.md``): ``fused`` where that can be, else ``stages``.

    Where no C++ compiler is installed (on the CPU), one line says so and the student stays as it is.

    Args:
        student: What :func:`modiff.quantize` or :func:`modiff.load` returned.
        mode: See above. Another mode replaces an earlier one.
        choose: ``measured``: at the first call, time each operator or fused block in integers and in full precision,
            and leave in full precision what is not at least 10 % faster in integers. A list of names, such as
            :func:`modiff.compiling.choose.in_float` of another student returns: leave these. None: as loaded.
        compute_dtype: ``bfloat16``: run what lies between the operators in bfloat16, from the first layer to the last
            norm; the operators' states stay in float32.
        cuda_graph: Record whole evaluations as CUDA graphs, and replay them (:mod:`modiff.compiling.graphs`); with mode
            ``whole`` what is recorded is the compiled graph.

    Returns:
        The same student.

    Raises:
        ConfigError: An argument is unknown, the C++ operators that ``fused`` needs cannot be built, the denoiser has no
            repeated blocks, its offloading would be lost, or a CUDA graph is asked for on another device.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; allowed are {', '.join(MODES)}.")
    _check_options(choose, compute_dtype)
    state = state_of(student)
    state.refuse_inside("compiled")
    modules = _modules(student, mode)
    if cuda_graph:
        require_recordable(student)
    uncompile(student)
    fusion = _fuse(student, mode, cuda_graph)
    _use_options(student, fusion, choose, compute_dtype)
    if fusion is None:
        missing = _missing_compiler(student)
        if missing:
            log.warning("modiff.compile: %s, so the student runs eagerly. Install one, such as g++.", missing)
            return student
        # Operators outside of the graphs, and evaluations that run eagerly, have compiled element-wise work too.
        for operator in operators(student).values():
            operator.wrap_backend(compiled_backend)
    _use_regions(student, modules, mode, cuda_graph)
    return student


def _use_options(student: nn.Module, fusion: Fusion | None, choose: Any, compute_dtype: Any) -> None:
    """The dtype between operators, and which operators run in integers."""
    listeners = state_of(student).listeners
    if compute_dtype is not None:
        listeners.append(Bfloat16(student))
    if choose == "measured":
        listeners.append(Measured(student, chains_of(student, fusion.modules if fusion else [])))
    elif choose is not None:
        use_float(student, choose)


def _modules(student: nn.Module, mode: Mode) -> list[nn.Module]:
    """What becomes a graph of its own."""
    modules = [] if mode in ("auto", "fused", "stages") else [student] if mode == "whole" else repeated_blocks(student)
    if modules and reuse_of(state_of(student)) is not None:
        raise ConfigError(
            f"The {type(student).__name__} has a reuse schedule, which mode {mode!r} cannot follow: its graphs hold "
            "whole blocks. Use mode 'auto', 'fused' or 'stages'."
        )
    if any("_hf_hook" in vars(module) for module in modules):
        raise ConfigError(
            f"The {type(student).__name__} is offloaded by accelerate, whose hook is its forward; mode {mode!r} would "
            "take its place. Compile before enable_model_cpu_offload, or use mode 'stages'."
        )
    return modules


def _use_regions(student: nn.Module, modules: list[nn.Module], mode: Mode, cuda_graph: bool) -> None:
    """Graphs in the place of forwards, and around all of them a recorded evaluation."""
    if cuda_graph:
        use_graphs(student, inner=_Graph if mode == "whole" else None)
    if modules and not (cuda_graph and mode == "whole"):
        regions = Regions(modules, operators(student))
        state_of(student).listeners.append(regions)
        for module in modules:
            module.forward = CompiledForward(module, regions, _Graph)


def uncompile(student: nn.Module) -> nn.Module:
    """Run a student eagerly again; the inverse of :func:`compile`.

    Raises:
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state = state_of(student)
    state.refuse_inside("compiled")
    for operator in operators(student).values():
        operator.wrap_backend(None)
        operator.prefer_backend(None)
    for made in [listener for listener in state.listeners if isinstance(listener, MADE)]:
        made.removed(state)
        state.listeners.remove(made)
    return student


def _check_options(choose: Any, compute_dtype: Any) -> None:
    if compute_dtype not in (None, "bfloat16"):
        raise ConfigError(f"compute_dtype is {compute_dtype!r}; allowed are 'bfloat16' and None.")
    if isinstance(choose, str) and choose != "measured":
        raise ConfigError(f"choose is {choose!r}; allowed are 'measured', a list of operators' names, and None.")


def _fuse(student: nn.Module, mode: Mode, cuda_graph: bool) -> Fusion | None:
    """Fused blocks, where they are asked for and can be: on Triton's kernels, or on C++ operators.

    Raises:
        ConfigError: They are asked for by name and cannot be.
    """
    if mode not in ("auto", "fused"):
        return None
    on_cpu = all(parameter.device.type == "cpu" for parameter in student.parameters())
    if not any(op.choice(op.module.weight.device).name == "triton" for op in operators(student).values()):
        problem = build.problem() if on_cpu else "they are for the CPU, and no operator runs on the Triton kernels"
        if problem is not None and mode == "fused":
            raise ConfigError(f"mode 'fused' needs the C++ operators: {problem}. Use mode 'stages'.")
        if problem is not None or cuda_graph:
            return None
        for operator in operators(student).values():
            operator.prefer_backend("cpp")
    compiles = not _missing_compiler(student)
    for operator in operators(student).values():
        operator.wrap_backend(compiled_backend if compiles and not _on_fusing_backend(operator) else None)
    fusion = Fusion(student, kind_of)
    state_of(student).listeners.append(fusion)
    return fusion


def _on_fusing_backend(operator: QuantizedOperator) -> bool:
    return fuses(operator.choice(operator.module.weight.device).backend)


MADE = (Regions, Fusion, Bfloat16, Measured)


def has_regions(student: nn.Module) -> bool:
    """Whether parts of a student run in graphs of their own (modes ``blocks`` and ``whole``)."""
    return any(isinstance(listener, Regions) for listener in state_of(student).listeners)


def fused_blocks(student: nn.Module) -> Fusion | None:
    """The fused blocks of a student, and why others are not; None where nothing is fused."""
    return next((f for f in state_of(student).listeners if isinstance(f, Fusion)), None)


class _Graph:
    """A function compiled as one graph; where it does not allow that, in several, which one line says."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.options: dict[str, Any] = {"dynamic": False, "recompile_limit": RECOMPILES}
        self.compiled = torch.compile(function, fullgraph=True, **self.options)
        self.full = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            if not self.full:
                raise
            reason = str(error).strip().splitlines()[0]
            log.warning("modiff.compile: not one graph (%s); compiled in parts.", reason)
            self.full = False
            self.compiled = torch.compile(self.function, **self.options)
            return self.compiled(*args, **kwargs)


def _missing_compiler(student: nn.Module) -> str | None:
    """What is missing for ``torch.compile`` on the student's device; None where it can run."""
    return missing_compiler(next((p.device for p in student.parameters()), torch.device("cpu")))
