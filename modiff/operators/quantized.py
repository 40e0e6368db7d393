"""Plain post-training quantization of one linear operator: the baseline, and the base of the modulated one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.quant import QuantSpec
from modiff.errors import CalibrationError, ConfigError, TrajectoryError
from modiff.kernels.select import Choice, IntegerProduct, choose
from modiff.kernels.stages import Limits, encode
from modiff.operators import execution
from modiff.operators.adapters import OperatorAdapter
from modiff.operators.dtypes import compute_input, memory_format, output_dtype
from modiff.operators.standin import StandIn
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.granularity import Partition, activation_partition
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest
from modiff.trajectory.cache import Region
from modiff.trajectory.session import ModulationState


class QuantizedOperator(StandIn):
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
        backend: ``simulate``, or ``auto``: integer products where they are exact.

    Raises:
        ConfigError: The weight is on the meta device, or holds NaN or Inf.
    """

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
        super().__init__()
        self.module: Any = module
        self.name = name
        self.adapter = adapter
        self.weight_spec = weight
        self.activation_spec = activation
        self.state = state
        self.dropped = False
        self.packed = packed
        self.calibrated: CalibratedRange | None = None  # outside the buffers: a dtype change must not round it
        self.backend = backend
        self.integer: IntegerProduct | None = None
        self.region = Region()
        self._choices: dict[tuple[torch.device, torch.dtype], bool] = {}
        self._limits: dict[tuple[Any, ...], Limits] = {}
        self._partitions: dict[int, Partition] = {}
        # Kept outside the buffers: a dtype change of the student must not round the quantized weight again.
        self._quantized_weight: Tensor | None = None
        self.layout = memory_format(self.module.weight)
        self.train(module.training)
        self._weight_arrives = False
        if packed is None:
            self.quantize_weight()
        self.register_load_state_dict_pre_hook(self._before_load)
        self.register_load_state_dict_post_hook(self._after_load)

    def quantize_weight(self) -> None:
        """Round the original's weight, as it is now, to nearest.

        Raises:
            ConfigError: It is on the meta device, or holds NaN or Inf.
        """
        weight: Tensor = self.module.weight
        if self.weight_spec is None:
            return
        if weight.is_meta:
            raise ConfigError(
                f"The weight of operator {self.name!r} is on the meta device. Load the teacher's weights before "
                "modiff.quantize, or read a saved student with modiff.load."
            )
        with torch.inference_mode(False), torch.no_grad():
            quantized = round_nearest(weight, self.weight_spec)
            if not torch.isfinite(quantized.scale).all():
                raise ConfigError(
                    f"The weight of operator {self.name!r} holds NaN or Inf, so it cannot be quantized. Check the "
                    f"checkpoint, or exclude the operator with Rule({self.name!r}, skip=True)."
                )
            self.use(PackedWeight.pack(quantized, self.weight_spec))

    def use(self, packed: PackedWeight) -> None:
        """Put another quantized weight of the same spec and shape in place."""
        self.packed, self._quantized_weight, self.integer = packed, None, None
        self.quantized_weight()

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

    def num_sets(self, spec: QuantSpec) -> int:
        """How many scales the operator's inputs have under a spec that does not depend on the batch."""
        channels = self.weight_shape[1] * int(getattr(self.module, "groups", 1))
        if spec.granularity == "group":
            assert spec.group_size is not None
            return -(-channels // spec.group_size)
        return channels if spec.granularity == "channel" else 1

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

    def calibrated_scale(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
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

    def limits(self, like: Tensor, clip: float | None, fixed: bool) -> Limits:
        """The quantizer's numbers as tensors, kept: see :class:`modiff.kernels.stages.Limits`."""
        assert self.activation_spec is not None
        key = (clip, fixed, like.dtype, like.device)
        if key not in self._limits:
            with torch.inference_mode(False):
                self._limits[key] = Limits.of(self.activation_spec, like, clip, fixed)
        return self._limits[key]

    def choice(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Choice:
        """Which execution the operator gets for inputs on a device, and why."""
        if self.backend == "simulate":
            return Choice("simulate")
        return choose(self.module, self.weight_spec, self.activation_spec, device, dtype)

    def code_offset(self, a: Tensor) -> int | None:
        """The unsigned code that stands for 0 where the product of ``a`` runs in integers; None where it does not."""
        key = (a.device, a.dtype)
        if key not in self._choices:
            self._choices[key] = self.choice(*key).backend == "onednn"
        self.region.shape, self.region.offset = a.shape, None
        # A graph that makes these would be made anew afterwards.
        self.limits(a, None, self.calibrated is not None)
        self.partition(a.ndim)
        if not self._choices[key]:
            return None
        if self.integer is None:
            assert self.packed is not None
            assert self.activation_spec is not None
            self.integer = IntegerProduct(self.module, self.packed, self.activation_spec)
        self.integer.prepare()
        self.region.offset = self.integer.offset
        return self.region.offset

    def quantized_weight(self) -> Tensor:
        """The values in the products, float32 (float64 for float64 weights); made at the first call, then kept."""
        if self._quantized_weight is None:
            assert self.packed is not None
            with torch.inference_mode(False), torch.no_grad():
                values = self.packed.unpack().dequantize()
                self._quantized_weight = values.contiguous(memory_format=self.layout)
        return self._quantized_weight

    def drop_original(self, dtype: torch.dtype | None = None, layout: torch.memory_format | None = None) -> None:
        """Free the original's weight; :func:`modiff.restore` then needs the teacher.

        An empty parameter stays in its place, of which other code reads the dtype and device.

        Args:
            dtype: Of the empty parameter; None: as it was.
            layout: Of the values in the products; None: as it was.
        """
        old = self.module._parameters.get("weight")
        if self.packed is not None and old is not None:  # a parametrized weight is computed: nothing to free
            empty = torch.empty(0, dtype=dtype or old.dtype, device=self.packed.codes.device)
            self.module.weight = nn.Parameter(empty, requires_grad=old.requires_grad)
            self.dropped = True
        self.layout = layout or self.layout

    @property
    def num_weight_scales(self) -> int:
        """How many scales the quantized weight has; 0 in full precision."""
        return 0 if self.packed is None else self.packed.scale.numel()

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the original's weight."""
        shape: torch.Size = self.module.weight.shape if self.packed is None else self.packed.shape
        return shape

    @property
    def weight(self) -> Tensor:
        """The original's parameter; where it was dropped, the quantized values in its dtype."""
        weight: Tensor = self.module.weight
        return self.quantized_weight().to(weight.dtype) if self.dropped else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias in the products: the original's, with the quantized weight's shift."""
        bias: Tensor | None = self.module.bias
        shift = None if self.packed is None else self.packed.shift
        if shift is None:
            return bias
        return shift if bias is None else bias + shift

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input (equations 4 and 5) and apply the operator."""
        if torch.compiler.is_compiling():
            return self.traced(x)
        self.check(x)
        out_dtype = output_dtype(x)
        a = compute_input(x)
        if self.activation_spec is None:
            self.state.note(self.name, a.sum(), quantized=None)
            return self.product(a, with_bias=True).to(out_dtype)
        offset = self.code_offset(a)
        codes, scale, probe = execution.encode(self, a, None, offset, self.calibrated_scale(a))
        self.state.note(self.name, probe, quantized=True)
        if offset is None:
            return self.product(codes, with_bias=True).to(out_dtype)
        output = execution.multiply(self, codes, offset)
        return self.add_bias(output.mul_(execution.output_scale(scale, output))).to(out_dtype)

    def traced(self, x: Tensor) -> Tensor:
        """The same while ``torch.compile`` traces: no bookkeeping (done outside by :mod:`modiff.compiling.regions`)."""
        self.check(x)
        a = compute_input(x)
        if self.activation_spec is None:
            return self.product(a, with_bias=True).to(output_dtype(x))
        offset = self.region.offset
        limits = self.limits(a, None, self.region.fixed is not None)
        codes, scale, _ = encode(a, None, None, limits, self.partition(a.ndim), self.region.fixed, True, offset)
        if offset is None:
            return self.product(codes, with_bias=True).to(output_dtype(x))
        output = execution.multiply(self, codes, offset)
        return self.add_bias(output * execution.output_scale(scale, output)).to(output_dtype(x))

    def add_bias(self, output: Tensor) -> Tensor:
        """Add the bias in place, once (equation 9)."""
        if self.bias is None:
            return output
        bias = self.bias.detach().to(output.dtype)
        return output.add_(
            bias if self.adapter.kind == "linear" else bias.view(-1, *[1] * len(self.module.kernel_size))
        )

    def quantizer_input(self, x: Tensor) -> Tensor | None:
        """What the next call with ``x`` will quantize with a calibrated range; None where it will quantize nothing."""
        return None if self.activation_spec is None else compute_input(x)

    def product(self, a: Tensor, with_bias: bool) -> Tensor:
        """``A(a)``, or ``A(a) + bias``, in the dtype of ``a``, whatever autocast says."""
        weight = self.module.weight if self.packed is None else self.quantized_weight()
        bias = self.bias if with_bias else None
        if torch.is_grad_enabled():  # else as it is: PyTorch picks another product for weights that require a gradient
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        weight, bias = weight.to(a.dtype), None if bias is None else bias.to(a.dtype)
        if torch.is_autocast_enabled(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return self.adapter.apply(self.module, a, weight, bias)
        return self.adapter.apply(self.module, a, weight, bias)

    def partition(self, ndim: int) -> Partition:
        """Which elements of an input with ``ndim`` dims share a scale."""
        if ndim not in self._partitions:
            assert self.activation_spec is not None
            batched = self.adapter.is_batched(self.module, ndim)
            self._partitions[ndim] = activation_partition(self.activation_spec, ndim, self.adapter.kind, batched)
        return self._partitions[ndim]

    def check(self, x: Tensor) -> None:
        """Refuse what could only give wrong numbers.

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.state.refuse_move(casts=fn(torch.empty(1)).dtype != torch.float32)
        super()._apply(fn, recurse)
        self.integer, self._choices, self._limits, self.region = None, {}, {}, Region()
        if self.state.regions is not None:
            self.state.regions.ready = False  # an evaluation that had begun, offloaded on its way, runs eagerly
        if self.calibrated is not None:
            self.calibrated = self.calibrated.to(fn(torch.empty(1, device=self.calibrated.scale.device)).device)
        if self.packed is not None:
            probe = torch.empty([2] * len(self.packed.shape), device=self.packed.codes.device)
            probe = fn(probe.to(memory_format=self.layout))
            self.layout = memory_format(probe)
            self.packed = self.packed.to(probe.device)
            if self._quantized_weight is not None:
                moved = self._quantized_weight.to(probe.device)
                self._quantized_weight = moved.contiguous(memory_format=self.layout)
        return self

    def _before_load(self, _: nn.Module, state_dict: Mapping[str, Any], prefix: str, *__: Any) -> None:
        self.state.refuse_inside("loaded into")
        old = self.module._parameters.get("weight")
        new = state_dict.get(f"{prefix}module.weight")
        # The same weight again must not undo another rounding than to nearest.
        same = new is not None and old is not None and old.shape == new.shape and torch.equal(old, new.to(old))
        self._weight_arrives = self.packed is not None and not same and (new is not None or old is None)
        if self.dropped and new is not None and new.shape == self.weight_shape:
            room = torch.empty(self.weight_shape, dtype=self.module.weight.dtype, device=self.module.weight.device)
            self.module.weight = nn.Parameter(room, requires_grad=self.module.weight.requires_grad)

    def _after_load(self, *_: Any) -> None:
        if self._weight_arrives and self.module.weight.shape == self.weight_shape:  # else PyTorch says what is wrong
            self.quantize_weight()
            self.calibrated = None  # it was found with other weights
        if self.dropped:
            self.drop_original()

    def extra_repr(self) -> str:
        """Bits of both sides."""
        return f"weight={self.weight_spec}, activation={self.activation_spec}"
