"""``modiff.compile``: the parts of a student that ``torch.compile`` makes faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from modiff.compiling.graphs import use_graphs
from modiff.compiling.regions import CompiledForward, Regions
from modiff.errors import ConfigError
from modiff.kernels.compiled import RECOMPILES, compiled_backend
from modiff.student.blocks import repeated_blocks
from modiff.student.reuse import reuse_of
from modiff.student.swap import operators
from modiff.trajectory.session import state_of

log = logging.getLogger("modiff")

Mode = Literal["auto", "stages", "blocks", "whole"]
MODES: tuple[Mode, ...] = get_args(Mode)


def compile(  # noqa: A001 (modiff.compile)
    student: nn.Module, mode: Mode = "auto", cuda_graph: bool = False
) -> nn.Module:
    """Compile a student, in place; it is compiled when it is first called.

    ``stages``: only the element-wise stages around each product (difference, range, codes, reconstruction; scale and
    add), once for all operators and shapes: seconds. ``blocks``: each repeated block of the denoiser. ``whole``: the
    denoiser as one graph (``fullgraph=True`` where it allows that). In the last two the first evaluation of a
    trajectory and refreshes run eagerly; all others share one graph for each shape. ``auto`` takes ``stages``, the
    fastest of the three where they were measured, compile time left aside or not (``benchmarks/cpu.md``).

    Where no C++ compiler is installed (on the CPU), one line says so and the student stays as it is.

    Args:
        student: What :func:`modiff.quantize` or :func:`modiff.load` returned.
        mode: See above. Another mode replaces an earlier one.
        cuda_graph: Record whole evaluations as CUDA graphs, and replay them (:mod:`modiff.compiling.graphs`); with mode
            ``whole`` what is recorded is the compiled graph.

    Returns:
        The same student.

    Raises:
        ConfigError: The mode is unknown, the denoiser has no repeated blocks, its offloading would be lost, or a CUDA
            graph is asked for on another device.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; allowed are {', '.join(MODES)}.")
    state = state_of(student)
    state.refuse_inside("compiled")
    modules = [] if mode in ("auto", "stages") else [student] if mode == "whole" else repeated_blocks(student)
    if modules and reuse_of(state) is not None:
        raise ConfigError(
            f"The {type(student).__name__} has a reuse schedule, which mode {mode!r} cannot follow: its graphs hold "
            "whole blocks. Use mode 'auto' or 'stages'."
        )
    if any("_hf_hook" in vars(module) for module in modules):
        raise ConfigError(
            f"The {type(student).__name__} is offloaded by accelerate, whose hook is its forward; mode {mode!r} would "
            "take its place. Compile before enable_model_cpu_offload, or use mode 'stages'."
        )
    uncompile(student)
    missing = _missing_compiler(student)
    if missing:
        log.warning("modiff.compile: %s, so the student runs eagerly. Install one, such as g++.", missing)
        return student
    # Operators outside of the graphs, and evaluations that run eagerly, have compiled element-wise work too.
    for operator in operators(student).values():
        operator.wrap_backend(compiled_backend)
    if cuda_graph:
        use_graphs(student, inner=_Graph if mode == "whole" else None)
    if modules and not (cuda_graph and mode == "whole"):
        regions = Regions(modules, operators(student))
        state.listeners.append(regions)
        for module in modules:
            module.forward = CompiledForward(module, regions, _Graph)
    return student


def uncompile(student: nn.Module) -> nn.Module:
    """Run a student eagerly again; the inverse of :func:`compile`.

    Raises:
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state = state_of(student)
    state.refuse_inside("compiled")
    for operator in operators(student).values():
        operator.wrap_backend(None)
    for regions in [listener for listener in state.listeners if isinstance(listener, Regions)]:
        regions.removed(state)
        state.listeners.remove(regions)
    return student


def has_regions(student: nn.Module) -> bool:
    """Whether parts of a student run in graphs of their own (modes ``blocks`` and ``whole``)."""
    return any(isinstance(listener, Regions) for listener in state_of(student).listeners)


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
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        return None
    from torch._inductor import cpp_builder, exc  # importing it takes a second

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler is installed"
    return None
