"""Parts of a student that run compiled: what they may not do inside a graph is done here, around each evaluation."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from modiff.operators.modulated import ModulatedOperator
from modiff.operators.quantized import QuantizedOperator
from modiff.trajectory.cache import OperatorCache
from modiff.trajectory.contexts import Context
from modiff.trajectory.graphs import outside
from modiff.trajectory.listeners import Listener
from modiff.trajectory.schedule import Answer
from modiff.trajectory.session import ModulationState


class Regions(Listener):
    """The compiled modules of a student, and the operators inside them.

    The first evaluation of a trajectory, refreshes, and evaluations whose arguments have another shape run eagerly:
    they allocate, and raise what there is to raise. All others find their state here and run in the graph, one for
    each shape.

    Args:
        modules: What is compiled: the student itself, or its repeated blocks.
        operators: All quantized operators of the student by name.
    """

    def __init__(self, modules: list[nn.Module], operators: Mapping[str, QuantizedOperator]) -> None:
        inside = {id(m) for module in modules for m in module.modules()}
        self.modules = modules
        self.operators = {name: op for name, op in operators.items() if id(op) in inside}
        self.ready = False
        self.paused = False  # everything runs eagerly, while it is measured
        for operator in self.operators.values():
            operator.traceable = True

    @override
    def before_evaluation(self, state: ModulationState, arguments: Sequence[Tensor]) -> None:
        """Decide whether the graphs may run, and give their operators the state."""
        self.ready = False
        if self.paused:
            return
        run = state.trajectory
        shapes = tuple((t.shape, t.dtype, t.device) for t in arguments)
        if run is None:
            self.ready = all(_runs_alone(op) for op in self.operators.values())
            here = Context("")
        else:
            here = run.current
            if here.age == 0:
                here.shapes = shapes
                return
            self.ready = shapes == here.shapes and all(self._has_state(op, here) for op in self.operators.values())
        if self.ready:
            for name, operator in self.operators.items():
                self._give(operator, here.caches.get(name, []), arguments, state)

    @override
    def after_evaluation(self, state: ModulationState, output: Any) -> None:
        """Count what ran in the graphs."""
        run = state.trajectory
        if not self.ready or run is None:
            return
        for name, operator in self.operators.items():
            region = operator.region
            if isinstance(operator, ModulatedOperator) and not operator.in_float:
                state.calls[name] = region.call
                skipped = sum(region.reuses)
                if skipped:
                    run.current.unchanged[name] = run.current.unchanged.get(name, 0) + skipped
            state.called.add(name)
            if operator.activation_spec is not None and not operator.in_float:
                state.quantized[0] += 1
                state.quantized[1] += 1
            for cache in region.caches:
                cache.encoded = None
            region.caches = []

    @override
    def closed(self, state: ModulationState) -> None:
        """Let go of the state of the trajectory that ended."""
        self.ready = False
        for operator in self.operators.values():
            operator.region.caches = []

    @override
    def moved(self, state: ModulationState) -> None:
        """Run an evaluation that had begun, and is offloaded on its way, eagerly."""
        self.ready = False

    @override
    def removed(self, state: ModulationState) -> None:
        """Put the eager forwards back; accelerate's offloading, which came after, stays around them."""
        for operator in self.operators.values():
            operator.traceable = False
        for module in self.modules:
            inner = vars(module).get("_old_forward")
            if isinstance(inner, CompiledForward):
                module._old_forward = inner.eager  # type: ignore[assignment]
            else:
                vars(module).pop("forward", None)

    def _has_state(self, operator: QuantizedOperator, here: Context) -> bool:
        if operator.in_float:  # it keeps none
            return True
        if operator.activation_spec is not None and operator.region.shape is None:
            return False
        if not isinstance(operator, ModulatedOperator):
            return True
        caches = here.caches.get(operator.name, [])
        expected = (here.calls or {}).get(operator.name, 0)
        # A leader outside of the graphs gives its codes to eager operators only.
        led = all(cache.leader is None or self._holds(cache.leader, here) for cache in caches)
        leads = all(not cache.followers or self._all_inside(cache, here) for cache in caches)
        return expected == len(caches) > 0 and led and leads and not operator.refreshes()

    def _holds(self, leader: Any, here: Context) -> bool:
        return any(leader is cache for name in self.operators for cache in here.caches.get(name, []))

    def _all_inside(self, leader: Any, here: Context) -> bool:
        outside = (cache for name, caches in here.caches.items() if name not in self.operators for cache in caches)
        return all(cache.leader is not leader for cache in outside)

    def _give(
        self,
        operator: QuantizedOperator,
        caches: list[OperatorCache],
        arguments: Sequence[Tensor],
        state: ModulationState,
    ) -> None:
        region = operator.region
        region.call, region.caches = 0, caches
        region.reuses = tuple(state.schedule.traced(cache, arguments) is Answer.REUSE for cache in caches)
        for cache, reuses in zip(caches, region.reuses, strict=True):
            cache.encoded = None
            cache.source = cache.source if reuses else None
        if operator.calibrated is not None:
            assert region.shape is not None
            assert region.execution is not None
            fixed = operator.calibrated_scale(torch.empty(region.shape, device="meta"))
            region.execution = region.execution._replace(quantizer=region.execution.quantizer.at(fixed))


class CompiledForward:
    """Stands for the ``forward`` of a compiled module: the graph where it may run, else the module's own.

    A copy or pickle of the module gets its own forward back: it is not compiled.

    Args:
        module: The module.
        regions: Says whether the graph may run.
        compile_: Compiles a function.
    """

    def __init__(
        self, module: nn.Module, regions: Regions, compile_: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.eager: Callable[..., Any] = types.MethodType(type(module).forward, module)
        self.module = module
        self.regions = regions
        self.compiled = compile_(self.eager)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        if torch.compiler.is_compiling():
            return outside(self, *args, **kwargs)
        if not self.regions.ready:
            return self.eager(*args, **kwargs)
        return self.compiled(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return types.MethodType, (type(self.module).forward, self.module)


def _runs_alone(operator: QuantizedOperator) -> bool:
    """Whether an operator may run in a graph outside a trajectory."""
    if isinstance(operator, ModulatedOperator) or (operator.calibrated is not None and operator.calibrated.buckets > 1):
        return False
    return operator.activation_spec is None or operator.region.shape is not None
