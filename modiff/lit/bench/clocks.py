"""Measurements of ``modiff bench``: interleaved times, stages of an evaluation, peak memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from modiff.kernels.elementwise import ElementwiseBackend
from modiff.operators.quantized import QuantizedOperator

Call = Callable[[Tensor, Tensor], Any]
STAGES = ("products", "modulation", "rest")


class Inputs:
    """x and t of the k-th evaluation: they drift from one noise to another, as along a trajectory.

    Args:
        first: x of the first evaluation, ``[B, C, H, W]``.
        last: Of the last one.
        count: Evaluations; further ones stay at the last.
        timesteps: Time steps of the teacher's schedule; t falls from the highest to 0.
    """

    def __init__(self, first: Tensor, last: Tensor, count: int, timesteps: int = 1000) -> None:
        self.first, self.last, self.count, self.timesteps = first, last, count, timesteps

    def at(self, k: int) -> tuple[Tensor, Tensor]:
        """New tensors, as a sampler makes them: ``x`` and a scalar ``t`` (int64)."""
        share = min(1.0, k / max(1, self.count - 1))
        x = torch.lerp(self.first, self.last, share)
        t = round((1 - share) * (self.timesteps - 1))
        return x, torch.tensor(t, device=self.first.device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``work`` in seconds, including the time of the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def interleave(
    calls: Mapping[str, Call],
    inputs: Inputs,
    rounds: int,
    evaluations: int,
    device: torch.device,
    first: int,
    ready: Callable[[str], None] = lambda name: None,
) -> dict[str, list[list[float]]]:
    """Time calls in turns, so that drift of the machine affects all of them alike.

    Args:
        calls: By name, in the order of a round.
        inputs: All calls get the same.
        rounds: Each gives every call one turn.
        evaluations: Consecutive evaluations of a turn, each timed.
        device: Where they run.
        first: Index of the first evaluation.
        ready: Called before each turn, off the clock.

    Returns:
        Seconds by name, round and evaluation.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            ready(name)
            times = []
            for i in range(evaluations):
                x, t = inputs.at(first + turn * evaluations + i)
                times.append(seconds(lambda call=call, x=x, t=t: call(x, t), device))  # type: ignore[misc]
            found[name].append(times)
    return found


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, extremes and count.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'min': 1.0, 'max': 5.0, 'count': 5}
    """
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": low,
        "q3": high,
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


@dataclass
class OperatorTimes:
    """Seconds of one operator in one evaluation: all of it, and its product alone."""

    forward: float = 0.0
    product: float = 0.0


@dataclass
class Stages:
    """Seconds of one evaluation by stage.

    Args:
        whole: All of it.
        operators: By name.
        fused: Seconds of an evaluation with fused blocks, of what ran before the products in it, and of these.
    """

    whole: float = 0.0
    operators: dict[str, OperatorTimes] = field(default_factory=dict)
    fused: tuple[float, float, float] | None = None

    @classmethod
    def median(cls, found: Sequence[Stages]) -> Stages:
        """The median of every figure, over several evaluations."""
        middle = statistics.median
        operators = {
            name: OperatorTimes(
                middle(s.operators[name].forward for s in found), middle(s.operators[name].product for s in found)
            )
            for name in found[0].operators
        }
        fused = [s.fused for s in found if s.fused is not None]
        medians = tuple(middle(values) for values in zip(*fused, strict=True)) if fused else None
        return cls(middle(s.whole for s in found), operators, medians)  # type: ignore[arg-type]

    @property
    def products(self) -> float:
        """The linear operators' products; of an operator in full precision, all of it."""
        return sum(times.product for times in self.operators.values())

    @property
    def modulation(self) -> float:
        """What quantized operators do besides: difference, range, quantize, update of â, accumulate into ô."""
        return sum(times.forward - times.product for times in self.operators.values())

    @property
    def rest(self) -> float:
        """Everything outside the linear operators: norms, activations, attention, residual sums."""
        return self.whole - self.products - self.modulation


def stages(operators: Mapping[str, nn.Module], call: Callable[[], Any], device: torch.device) -> Stages:
    """Time one eager evaluation by stage, in place: clocks stand around every operator and its product.

    On CUDA each clock waits for the device, so that the stages' sum is longer than an evaluation without clocks.

    Args:
        operators: By name; quantized or not.
        call: The evaluation.
        device: Where it runs.
    """
    found = Stages(operators={name: OperatorTimes() for name in operators})
    with _clocks(operators, found.operators, device):
        found.whole = seconds(call, device)
    return found


def fused_stages(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Time one evaluation of a student with fused blocks by the clocks inside its C++ operators.

    Returns:
        Seconds of all of it, of what runs before the products in their operators, and of the products and what follows.
    """
    torch.ops.modiff.cpp_clocks()
    whole = seconds(call, torch.device("cpu"))
    before, products = torch.ops.modiff.cpp_clocks()
    return whole, before, products


@contextmanager
def _clocks(
    operators: Mapping[str, nn.Module], times: dict[str, OperatorTimes], device: torch.device
) -> Iterator[None]:
    started: dict[str, float] = {}

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def before(name: str) -> Callable[..., None]:
        return lambda *_: started.__setitem__(name, now())

    def after(name: str, quantized: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            passed = now() - started[name]
            times[name].forward += passed
            times[name].product += 0.0 if quantized else passed

        return hook

    def clocked(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            start = now()
            output = product(*args, **kwargs)
            times[name].product += now() - start
            return output

        return timed

    handles: list[Any] = []
    wrapped: list[tuple[Any, Any]] = []
    try:
        for name, module in operators.items():
            quantized = isinstance(module, QuantizedOperator)
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name, quantized)))
            if quantized:
                wrapped.append((module, module.wrapper))
                module.product = clocked(name, module.product)  # type: ignore[method-assign,operator]
                module.wrap_backend(partial(_Clocked, clock=partial(clocked, name), inner=module.wrapper))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, wrapper in wrapped:
            del module.product
            module.wrap_backend(wrapper)


class _Clocked(ElementwiseBackend):
    """A backend whose products are under a clock; what it fuses is split into its three parts."""

    def __init__(self, backend: Any, clock: Callable[..., Any], inner: Callable[[Any], Any] | None) -> None:
        backend = backend if inner is None else inner(backend)
        self.multiply = clock(backend.multiply)  # type: ignore[method-assign]
        self.encode, self.update, self.prepare = backend.encode, backend.update, backend.prepare  # type: ignore[method-assign]
        self.name, self.devices = backend.name, backend.devices


def peak_memory(work: Callable[[], Any], device: torch.device) -> tuple[float, str]:
    """Measure the peak memory of ``work`` beyond what was in use before, in MiB, and say how it was measured.

    CUDA: the allocator's peak. Linux: the process' peak resident memory, which the kernel keeps and which is reset
    here, after freed memory was given back to the system. Elsewhere: resident memory, looked at every millisecond.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, "peak of the CUDA allocator"
    _give_back()
    if sys.platform == "linux" and _reset_peak():
        before = psutil.Process().memory_info().rss
        work()
        return max(0, _peak_resident() - before) / 2**20, "growth of the process' peak resident memory (VmHWM)"
    return _sampled_peak(work), "growth of the process' resident memory, sampled every millisecond"


def _give_back() -> None:
    """Ask the C library to return freed memory to the system, so that it does not hide what the next work takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library than glibc
        return


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled_peak(work: Callable[[], Any]) -> float:
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        thread.join()
    return (peak - before) / 2**20
