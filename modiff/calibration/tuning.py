"""Scales and biases of all quantized operators, learned together from the denoiser's output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modiff.calibration.loop.arguments import CallArguments
from modiff.calibration.loop.capture import ClosedLoop
from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.loop.tracing import Evaluation, Trace
from modiff.calibration.settings import CalibrationSettings
from modiff.errors import CalibrationError
from modiff.operators.adapters import OperatorAdapter
from modiff.operators.dtypes import compute_input, output_dtype
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.wrapper import ModuleWrapper
from modiff.quantizers.packing import PackedWeight
from modiff.student.copies import shared_copy
from modiff.student.swap import operators


@dataclass(frozen=True)
class RecordedEvaluation:
    """One evaluation of the closed loop: arguments of the denoiser, by row or whole.

    Args:
        arguments: How tensors make up the arguments.
        whole: Tensors that do not have a row for each sample (a time step, position ids).
        first: First of its rows in the store.
        count: How many rows it has.
    """

    arguments: CallArguments
    whole: dict[str, Tensor]
    first: int
    count: int


def record_outputs(
    loop: ClosedLoop,
    trace: Trace,
    evaluations: int | None,
    most: int,
    store: SampleStore,
    generator: torch.Generator,
) -> list[RecordedEvaluation]:
    """Run once and keep what the student was given, and what the teacher answers to that.

    Afterwards the store of the first process holds the rows of all, in the order of trajectories.

    Args:
        loop: Student, teacher and run.
        trace: Of this run.
        evaluations: How many of a trajectory; None: all.
        most: Samples, in all: drawn anew in each evaluation, where the batch holds its share.
        store: Gets the rows: ``input.0`` .. and ``target``.
        generator: Draws them, on the CPU; see :meth:`ClosedLoop.drive`.

    Raises:
        CalibrationError: The teacher's answer holds no tensor or is not finite, or the store is full.
    """
    chosen, evaluation = trace.choose(evaluations), Evaluation()
    found: list[tuple[int, RecordedEvaluation]] = []
    keys: list[int] = []

    def begin(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        evaluation.start(index, args, kwargs)

    def end(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if evaluation.index not in chosen:
            return
        key = trace.ordinal(chosen, loop.trajectory, evaluation.index)
        share = trace.share(chosen, key, most)
        if share == 0:
            return
        with torch.no_grad():
            target = first_tensor(loop.teacher(*args, **kwargs))
        if not torch.isfinite(target).all():
            raise CalibrationError(f"NaN or Inf in the teacher's answer in {evaluation}. Check it in this dtype.")
        arguments, tensors = CallArguments.of(args, kwargs)
        batch = len(target)
        rows = torch.randperm(batch, generator=generator)[:share].sort().values
        by_row = {name: t for name, t in tensors.items() if t.ndim and len(t) == batch}
        whole = {name: t.clone() for name, t in tensors.items() if name not in by_row}
        store.append({name: t[rows.to(t.device)] for name, t in {**by_row, "target": target}.items()})
        found.append((key, RecordedEvaluation(arguments, whole, 0, len(rows))))
        keys.extend([key] * len(rows))

    loop.drive(begin, end, generator)
    store.collect(keys, loop.reducer)
    return _in_order(found, loop)


def _in_order(found: list[tuple[int, RecordedEvaluation]], loop: ClosedLoop) -> list[RecordedEvaluation]:
    """Order the evaluations of all processes, each with its place in the first one's store."""
    device = next(loop.teacher.parameters()).device
    if loop.reducer.world_size > 1:  # tensors travel on the CPU
        sent = [
            (key, replace(e, whole={n: t.cpu() for n, t in e.whole.items()}), {n: t.is_cpu for n, t in e.whole.items()})
            for key, e in found
        ]
        found = [
            (key, replace(e, whole={n: t if on_cpu[n] else t.to(device) for n, t in e.whole.items()}))
            for part in loop.reducer.gather(sent)
            for key, e, on_cpu in part
        ]
    ordered: list[RecordedEvaluation] = []
    first = 0
    for _, e in sorted(found, key=lambda item: item[0]):
        ordered.append(replace(e, first=first))
        first += e.count
    return ordered


def first_tensor(output: Any) -> Tensor:
    """Return the tensor in a denoiser's answer, or the first one in what it returned.

    Raises:
        CalibrationError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    tensors = CallArguments.of((output,), {})[1]
    if not tensors:
        raise CalibrationError(
            f"The denoiser returns a {type(output).__name__}, in which no tensor is found. Return a tensor, a tuple or "
            "a mapping that starts with one, or set tuning_iterations=0."
        )
    return next(iter(tensors.values()))


def tune(
    loop: ClosedLoop,
    weights: Mapping[str, PackedWeight],
    store: SampleStore,
    recorded: list[RecordedEvaluation],
    settings: CalibrationSettings,
    generator: torch.Generator,
) -> dict[str, PackedWeight]:
    """Learn a factor of each output channel's scales, and a shift of its bias; codes stay as they are.

    Rounding leaves each operator with an output that is a little too large or small, and off in the mean. Such errors
    are alike at all evaluations, so they add up along a trajectory, where random ones average out. Both are learned for
    all operators at once, by gradients of the error of the denoiser's output (end-to-end training of quantization
    parameters, as in EfficientQAT, Chen et al. 2024): inputs are the student's in closed loop, targets the teacher's.
    Each evaluation's error is measured in units of that before tuning. Activations stay in full precision meanwhile.

    Args:
        loop: Student and teacher.
        weights: Quantized weight by operator.
        store: Rows of :func:`record_outputs`.
        recorded: Its evaluations.
        settings: Steps, batch size, learning rate.
        generator: Draws the batches, on the CPU.

    Returns:
        The weights with other scales and shifts; as they were where that is no better.
    """
    twin, tunable = _twin(loop.teacher, operators(loop.student), weights)
    error = _OutputError(twin, store, settings.batch_size)
    units = [error.total(evaluation) for evaluation in recorded]
    kept = [(evaluation, unit) for evaluation, unit in zip(recorded, units, strict=True) if unit > 0]
    if not kept or not settings.tuning_iterations:
        return dict(weights)
    for operator in tunable.values():
        operator.start()
    variables = [v for operator in tunable.values() for v in (operator.gain, operator.shift)]
    optimizer = torch.optim.Adam(variables, lr=settings.tuning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.tuning_iterations)
    batches = _batches([evaluation.count for evaluation, _ in kept], settings.batch_size, generator)
    for _ in range(settings.tuning_iterations):
        applied = [v for operator in tunable.values() for v in operator.apply_variables()]
        which, rows = next(batches)
        evaluation, unit = kept[which]
        with torch.enable_grad():
            loss = error(evaluation, rows) / unit
        loss.backward(inputs=applied)
        for operator in tunable.values():
            operator.pull_gradients()
        optimizer.step()
        falling.step()
    for operator in tunable.values():
        operator.apply_variables()
    better = math.fsum(error.total(evaluation) / unit for evaluation, unit in kept) < len(kept)
    return {name: tunable[name].packed() if better else weight for name, weight in weights.items()}


class _OutputError:
    """The mean square error of a denoiser's output on recorded evaluations."""

    def __init__(self, denoiser: nn.Module, store: SampleStore, batch_size: int) -> None:
        self.denoiser = denoiser
        self.store = store
        self.batch_size = batch_size
        self.device = next(denoiser.parameters()).device

    def __call__(self, evaluation: RecordedEvaluation, rows: Tensor) -> Tensor:
        """Compute the error of some rows of an evaluation."""
        tensors = {key: t.to(self.device) for key, t in self.store.rows(rows + evaluation.first).items()}
        args, kwargs = evaluation.arguments.build({**evaluation.whole, **tensors})
        output, target = first_tensor(self.denoiser(*args, **kwargs)), tensors["target"]
        return (output.float() - target.float()).square().mean()

    @torch.no_grad()
    def total(self, evaluation: RecordedEvaluation) -> float:
        """Compute the error of all rows of an evaluation, without gradients."""
        parts = torch.arange(evaluation.count).split(self.batch_size)
        return math.fsum(self(evaluation, rows).item() * len(rows) for rows in parts) / evaluation.count


class _Tunable(ModuleWrapper):
    """A quantized operator in full-precision activations, with a gradient in its scales and bias."""

    def __init__(self, module: nn.Module, adapter: OperatorAdapter, weight: PackedWeight) -> None:
        super().__init__()
        self.module = module
        self.adapter = adapter
        self.weight_before = weight
        self.values = weight.unpack().dequantize()
        bias = torch.zeros(weight.shape[0], dtype=self.values.dtype, device=self.values.device)
        for known in (module.bias, weight.shift):
            if known is not None:
                bias += known.detach()  # type: ignore[operator]
        self.bias_before = bias
        out = 1 if weight.spec.granularity == "tensor" else weight.shape[0]
        self.gain, self.shift = bias.new_zeros(out), torch.zeros_like(bias)
        self.factor: Tensor | None = None
        self.offset = bias
        self.power, self.count, self.unit = 0.0, 0, 1.0

    def start(self) -> None:
        """Start from the factor 1 and the shift 0, in units of what the operator's outputs were until now."""
        self.unit = math.sqrt(self.power / max(self.count, 1)) or 1.0

    def apply_variables(self) -> tuple[Tensor, Tensor]:
        """Return factor and offset of each output channel, as the variables are now; leaves that collect gradients.

        Leaves, not functions of the variables: small graphs on top of each operator would cost as much as its product.
        """
        self.factor = self.gain.exp().requires_grad_()
        self.offset = (self.bias_before + self.unit * self.shift).requires_grad_()
        return self.factor, self.offset

    def pull_gradients(self) -> None:
        """Set the gradients of the variables from those of factor and offset; none where no output depends on them."""
        factor, offset = self.factor, self.offset
        assert factor is not None
        self.gain.grad = None if factor.grad is None else factor.grad * factor.detach()
        self.shift.grad = None if offset.grad is None else offset.grad * self.unit

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``exp(gain) A(x) + bias + unit shift``."""
        a = compute_input(x)
        output = self.adapter.apply(self.module, a, self.values.to(a.dtype), None)
        dim = -1 if self.adapter.kind == "linear" else output.ndim - len(self.module.kernel_size) - 1
        shape = [1] * output.ndim
        shape[dim] = -1
        offset = self.offset.to(a.dtype).reshape(shape)
        if self.factor is None:
            self.power += float(output.float().square().sum())
            self.count += output.numel()
            output = output + offset
        else:
            output = torch.addcmul(offset, output, self.factor.to(a.dtype).reshape(shape))
        return output.to(output_dtype(x))

    def packed(self) -> PackedWeight:
        """Return the weight with what was learned."""
        before = self.weight_before
        gain, shift = self.gain.exp().to(before.scale.dtype), (self.unit * self.shift).to(before.scale.dtype)
        scale = before.scale * gain.reshape(-1, *[1] * (before.scale.ndim - 1))
        return replace(before, scale=scale, shift=shift if before.shift is None else before.shift + shift)


def _twin(
    teacher: nn.Module, found: Mapping[str, QuantizedOperator], weights: Mapping[str, PackedWeight]
) -> tuple[nn.Module, dict[str, _Tunable]]:
    """Make a copy of the teacher that shares its tensors, with tunable operators."""
    twin = shared_copy(teacher)
    tunable = {}
    modules = {id(twin.get_submodule(name)): name for name in weights}
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        first = modules.get(id(module))
        if first is not None:
            if first not in tunable:
                tunable[first] = _Tunable(module, found[first].adapter, weights[first])
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, tunable[first])
    return twin, tunable


def _batches(counts: list[int], size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Yield pairs of an evaluation and some of its rows, shuffled, without end."""
    while True:
        rounds = [
            (which, rows)
            for which, count in enumerate(counts)
            for rows in torch.randperm(count, generator=generator).split(size)
        ]
        for i in torch.randperm(len(rounds), generator=generator).tolist():
            yield rounds[i]
