"""Plain post-training quantization of one linear operator: the baseline, and the base of the modulated one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.specs import Modulation, QuantSpec
from modiff.errors import CalibrationError, TrajectoryError
from modiff.kernels.backend import BACKENDS, Backend, FixedScale, OperatorShape, Prepared, Quantizer
from modiff.kernels.elementwise import rescale
from modiff.kernels.float import full_precision
from modiff.kernels.select import DEFINITION, Choice, choose
from modiff.operators.adapters import OperatorAdapter
from modiff.operators.dtypes import compute_input, output_dtype
from modiff.operators.execution import Execution, Region
from modiff.operators.vectors import is_vector
from modiff.operators.weight import WeightHolder
from modiff.quantizers.affine import Limits, frees_zero
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.granularity import Partition, activation_partition, granularity_of
from modiff.quantizers.packing import PackedWeight
from modiff.trajectory.graphs import in_graph, outside
from modiff.trajectory.remarks import COMPILED
from modiff.trajectory.session import ModulationState


class QuantizedOperator(WeightHolder):
    """A Linear or Conv whose weight and input are quantized: ``o = A(Q(a)) + bias``.

    The products run in float32 (float64 for float64 models) on quantized values; the output has the dtype that the
    original would return.

    Args:
        module: The original operator, kept untouched for :func:`modiff.restore` (but see :meth:`drop_original`).
        name: Its qualified name.
        adapter: How its type applies a weight.
        weight: Weight spec or None.
        activation: Activation spec or None. ``clip`` holds in every call: without state there is no first evaluation.
        state: Shared by all operators of the student.
        packed: The quantized weight, if it is known already; else the original's is rounded to nearest.
        backend: Name of a backend, or ``auto``: the fastest that is exact.

    Attributes:
        undecided: The activation spec that it gets if its first input turns out to be one vector per sample; None: what
            it reads is known.
        found_vector: It was.

    Raises:
        ConfigError: The weight is on the meta device, or holds NaN or Inf.
    """

    modulation: Modulation | None = None
    traceable = False  # modiff.compile keeps the books outside of its graphs

    def __init__(
        self,
        module: Any,
        name: str,
        adapter: OperatorAdapter,
        weight: QuantSpec | None,
        activation: QuantSpec | None,
        state: ModulationState,
        packed: PackedWeight | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(module, name, adapter, weight, packed)
        self.activation_spec = activation
        self.state = state
        self.undecided: QuantSpec | None = None
        self.found_vector = False
        state.names.add(name)
        self.calibrated: CalibratedRange | None = None  # outside the buffers: a dtype change must not round it
        self.backend = backend
        self.shape = adapter.shape(module, weight)
        self.wrapper: Callable[[Backend], Backend] | None = None
        self.preferred: str | None = None  # backend that modiff.compile chose in place of ``auto``
        self.fused = ""  # what else runs in the same pass, for describe
        self.in_float = False  # measured to be faster in full precision
        self.region = Region()
        self._executions: dict[tuple[Any, ...], Execution] = {}
        self._partitions: dict[int, Partition] = {}
        self.train(module.training)
        self._complete = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy prepares its weight for itself, and is not compiled."""
        kept: dict[str, Any] = {"wrapper": None, "preferred": None, "fused": "", "traceable": False}
        kept |= {"region": Region(), "_executions": {}}
        return {**self.__dict__, **kept}

    def use(self, packed: PackedWeight) -> None:
        """Put another quantized weight of the same spec and shape in place."""
        super().use(packed)
        self.forget_executions()

    def forget_executions(self) -> None:
        """Choose and prepare anew at the next call."""
        self._executions = {}

    def decide(self, x: Tensor) -> None:
        """In the first call: take the spec of vectors where ``x`` is one vector per sample.

        The weight stays as it is: it was quantized before anyone knew.
        """
        spec, self.undecided = self.undecided, None
        if is_vector(x, self.shape.kind, self.shape.is_batched(x.ndim)):
            self.activation_spec, self.found_vector, self._partitions = spec, True, {}
            self.forget_executions()

    def wrap_backend(self, wrapper: Callable[[Backend], Backend] | None) -> None:
        """Run by ``wrapper(backend)`` from now on; None: by the backend itself."""
        self.wrapper = wrapper
        changed = {k: e._replace(backend=self._wrapped(BACKENDS[e.backend.name])) for k, e in self._executions.items()}
        self._executions = changed

    def prefer_backend(self, name: str | None) -> None:
        """Run on a backend that ``auto`` would not take by itself, where it can; None: as configured."""
        if name is None and self.preferred is None:
            return
        self.preferred = None
        self.forget_executions()
        if name is not None and self.backend == "auto":
            self.preferred = name
            self.preferred = name if self.choice(self.module.weight.device).name == name else None

    def _wrapped(self, backend: Backend) -> Backend:
        return backend if self.wrapper is None else self.wrapper(backend)

    def use_range(self, found: CalibratedRange | None) -> None:
        """Quantize activations with calibrated scales and zero points from now on; None: with dynamic ones.

        Raises:
            CalibrationError: It was calibrated for another quantizer, or holds impossible numbers.
        """
        if found is not None:
            found.check_values()
            spec = self.activation_spec
            wanted = None if spec is None else (self.num_sets(spec), spec.timestep_buckets, not spec.symmetric)
            given = (found.sets, found.buckets, found.zero_point is not None)
            if given != wanted:
                raise CalibrationError(
                    f"The calibrated range of operator {self.name!r} is for another quantizer than {spec}: it has "
                    f"{given[0]} sets, {given[1]} buckets and {'a' if given[2] else 'no'} zero point. Calibrate again."
                )
            device = self.module.weight.device if self.packed is None else self.packed.codes.device
            found = found if device.type == "meta" else found.to(device)
        self.calibrated = found
        self.forget_executions()

    def num_sets(self, spec: QuantSpec) -> int:
        """How many scales the operator's inputs have under a spec that does not depend on the batch."""
        return granularity_of(spec).sets(self.shape.in_channels)

    def require_range(self) -> None:
        """Refuse to run without what the configuration asks for.

        Raises:
            CalibrationError: The range is to be calibrated and is not.
        """
        spec = self.activation_spec
        if spec is not None and spec.range == "calibrated" and self.calibrated is None:
            raise CalibrationError(
                f"Operator {self.name!r} has range 'calibrated', but was not calibrated. Make the student with "
                "modiff.calibration.calibrate, load a calibrated one, or use range 'dynamic'."
            )

    def calibrated_scale(self, x: Tensor) -> FixedScale | None:
        """Scale and zero point of the current evaluation, broadcasting against ``x``; None where they are dynamic.

        Raises:
            CalibrationError: See :meth:`require_range`.
            TrajectoryError: The trajectory is longer than calibrated, or there is none although time steps differ.
        """
        self.require_range()
        if self.calibrated is None:
            return None
        run, length = self.state.trajectory, self.calibrated.length
        if run is None and self.calibrated.buckets > 1:
            raise TrajectoryError(
                f"Operator {self.name!r} has calibrated ranges for {self.calibrated.buckets} buckets of time steps, "
                "and was called outside a trajectory. Wrap the sampling loop in `with modiff.trajectory(student):`."
            )
        evaluation = 0 if run is None else run.current.total
        if evaluation >= length:
            raise TrajectoryError(
                f"The trajectory is longer than calibrated: the ranges of operator {self.name!r} are from trajectories "
                f"of {length} evaluations. Sample with as many steps, or calibrate with more."
            )
        partition = self.partition(x.ndim)
        shape = partition.range_shape(x.shape)
        scale, zero_point = (
            None if t is None else partition.expand(t.reshape(shape), x.shape) for t in self.calibrated.at(evaluation)
        )
        assert scale is not None
        return scale, zero_point

    def choice(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
        """Which backend the operator gets for inputs on a device, and why."""
        quantizer = None
        if self.activation_spec is not None:
            ndim = len(self.shape.kernel) + 2
            quantizer = self._quantizer(torch.empty((), dtype=dtype), self.partition(ndim), clip=None)
        return choose(self.preferred or self.backend, self.shape, quantizer, device, dtype)

    @property
    def traced(self) -> bool:
        """Whether this runs in a graph of :func:`modiff.compile`, which keeps the books outside of it.

        A graph by somebody else's ``torch.compile`` breaks at each operator (:meth:`is_traced_by_others`).
        """
        return in_graph()

    def is_traced_by_others(self) -> bool:
        """Whether a ``torch.compile`` that is not :func:`modiff.compile`'s traces this call."""
        return torch.compiler.is_compiling() and not self.traceable

    def run_outside(self, input: Tensor) -> Tensor:  # noqa: A002 (as that of forward)
        """The forward, in a break of somebody else's graph; a line says once that little is gained by it."""
        self.state.remarks.say("compiled", COMPILED)
        output: Tensor = self.forward(input)
        return output

    def execution(self, a: Tensor) -> Execution:
        """How the products of ``a`` run in this evaluation; while ``torch.compile`` traces, as was found before."""
        if self.traced:
            assert self.region.execution is not None
            return self.region.execution
        key = (a.device, torch.promote_types(a.dtype, torch.float32), a.ndim)
        found = self._executions.get(key)
        if found is None:
            found = self._executions[key] = self._execution(a)
        self.region.execution, self.region.shape = found, a.shape
        return found

    def _execution(self, a: Tensor) -> Execution:
        a = torch.empty((1,) * a.ndim, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
        choice, partition = self.choice(a.device, a.dtype), self.partition(a.ndim)
        with torch.inference_mode(False), torch.no_grad():
            quantizer = self._quantizer(a, partition, clip=None)
            unclipped = self._quantizer(a, partition, clip=1.0)
            if self.packed is None:
                prepared = None
            elif choice.name == DEFINITION:
                prepared = Prepared(self.shape, self.quantized_weight())
            else:
                prepared = choice.backend.prepare(self.packed, self.shape)
        return Execution(self._wrapped(choice.backend), prepared, quantizer, unclipped)

    def _quantizer(self, like: Tensor, partition: Partition, clip: float | None) -> Quantizer:
        assert self.activation_spec is not None
        fixed = clip is None and self.calibrated is not None
        limits = Limits.of(self.activation_spec, like, clip, fixed)
        if self.modulation is not None and not fixed and frees_zero(self.activation_spec):
            limits = replace(limits, free=True)
        return Quantizer(self.activation_spec, partition, limits, modulation=self.modulation)

    def prepared(self, execution: Execution) -> Prepared:
        """The weight in products; the original's is looked up in every call, for it may be replaced."""
        return execution.prepared or Prepared(self.shape, self.original_weight)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (its name in PyTorch's operators)
        """Quantize the input (equations 4 and 5) and apply the operator.

        While ``torch.compile`` traces, :mod:`modiff.compiling.regions` does the bookkeeping outside.
        """
        if self.is_traced_by_others():
            return outside(self.run_outside, input)
        x = input
        self.check(x)
        a = compute_input(x)
        if self.activation_spec is None or self.in_float:
            if not self.traced:
                self.state.note(self.name, a.sum(), quantized=None)
            return self.product(a, with_bias=True).to(output_dtype(x))
        execution = self.execution(a)
        quantizer = execution.quantizer.at(self.fixed_scale(a))
        apply = getattr(execution.backend, "apply", None)
        if apply is not None:
            output, probe = apply(a, self.prepared(execution), quantizer, self.float_bias())
            self.note(probe, quantized=True)
            return output.to(output_dtype(x))
        encoded = execution.backend.encode(a, None, quantizer)
        self.note(encoded.probe, quantized=True)
        if encoded.scale is None:
            return self.product(encoded.codes, with_bias=True).to(output_dtype(x))
        product = execution.backend.multiply(self.prepared(execution), encoded)
        return self.add_bias(rescale(product, encoded)).to(output_dtype(x))

    def use_shape(self, shape: OperatorShape) -> None:
        """Run as another geometry (stride, padding, ...) of the same weight from now on."""
        self.shape = shape
        self.forget_executions()

    def fixed_scale(self, a: Tensor) -> FixedScale | None:
        """The calibrated scale of this evaluation; a graph finds it in its quantizer."""
        return self.execution(a).quantizer.fixed if self.traced else self.calibrated_scale(a)

    def note(self, probe: Tensor, quantized: bool) -> None:
        """Record a call in the open trajectory; a graph's are recorded when it has run."""
        if not self.traced:
            self.state.note(self.name, probe, quantized)

    def float_bias(self) -> Tensor | None:
        """The bias as a backend takes it."""
        return None if self.bias is None else self.bias.detach().float().contiguous()

    def add_bias(self, output: Tensor) -> Tensor:
        """Add the bias in place, once (equation 9)."""
        if self.bias is None:
            return output
        bias = self.bias.detach().to(output.dtype)
        return output.add_(bias if self.adapter.kind == "linear" else bias.view(-1, *[1] * len(self.shape.kernel)))

    def quantizer_input(self, x: Tensor) -> Tensor | None:
        """What the next call with ``x`` will quantize with a calibrated range; None where it will quantize nothing."""
        return None if self.activation_spec is None else compute_input(x)

    def product(self, a: Tensor, with_bias: bool) -> Tensor:
        """``A(a)``, or ``A(a) + bias``, in the dtype of ``a``, whatever autocast says."""
        weight = self.original_weight if self.packed is None else self.quantized_weight()
        return full_precision(a, weight, self.bias if with_bias else None, self.shape)

    def partition(self, ndim: int) -> Partition:
        """Which elements of an input with ``ndim`` dims share a scale."""
        if ndim not in self._partitions:
            assert self.activation_spec is not None
            batched = self.shape.is_batched(ndim)
            self._partitions[ndim] = activation_partition(self.activation_spec, ndim, self.shape.kind, batched)
        return self._partitions[ndim]

    def check(self, x: Tensor) -> None:
        """Refuse what could only give wrong numbers; decide what the first input decides.

        Raises:
            TypeError: The input is not floating point.
            TrajectoryError: The input requires a gradient.
        """
        if not x.is_floating_point():
            raise TypeError(f"Operator {self.name!r} got {x.dtype} input; allowed are floating-point tensors. Cast it.")
        if x.requires_grad and torch.is_grad_enabled():
            raise TrajectoryError(
                f"Operator {self.name!r} got an input that requires a gradient; a student has none (rounding has no "
                "slope). Run it under torch.no_grad()."
            )
        if self.undecided is not None and not self.traced:
            self.decide(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.state.refuse_move(casts=fn(torch.empty(1)).dtype != torch.float32)
        super()._apply(fn, recurse)
        self.forget_executions()
        self.region = Region()
        self.state.tell("moved")
        if self.calibrated is not None:
            self.calibrated = self.calibrated.to(fn(torch.empty(1, device=self.calibrated.scale.device)).device)
        self._move_weight(fn)
        return self

    def _before_load(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.state.refuse_inside("loaded into")
        super()._before_load(module, state_dict, prefix, *rest)

    def _after_load(self, *_: Any) -> None:
        if self._weight_arrives and self.module.weight.shape == self.weight_shape:
            self.calibrated = None  # it was found with other weights
        super()._after_load()

    def extra_repr(self) -> str:
        """Bits of both sides."""
        return f"weight={self.weight_spec}, activation={self.activation_spec}"
