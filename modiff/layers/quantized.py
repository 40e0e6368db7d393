"""Plain post-training quantization of one linear operator: the baseline, and the base of the modulated one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config import QuantSpec
from modiff.errors import ConfigError, TrajectoryError
from modiff.kernels.simulate import fake_quantize_
from modiff.layers.operators import OperatorAdapter
from modiff.layers.state import ModulationState
from modiff.quantizers.granularity import Partition, activation_partition
from modiff.quantizers.rounding import round_nearest


class QuantizedOperator(nn.Module):
    """A Linear or Conv whose weight and input are quantized: ``o = A(Q(a)) + bias``.

    The products run in float32 (float64 for float64 models) on quantized values; the output has the dtype that the
    original would return.

    Args:
        module: The original operator; it is not changed.
        name: Its qualified name.
        adapter: How its type applies a weight.
        weight: Weight spec or None.
        activation: Activation spec or None. ``clip`` holds in every call: without state there is no first evaluation.
        state: Shared by all operators of the student.

    Raises:
        ConfigError: The original's weight holds NaN or Inf.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        adapter: OperatorAdapter,
        weight: QuantSpec | None,
        activation: QuantSpec | None,
        state: ModulationState,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.name = name
        self.adapter = adapter
        self.weight_spec = weight
        self.activation_spec = activation
        self.state = state
        self.num_weight_scales = 0
        self._partitions: dict[int, Partition] = {}
        self._quantized_weight: Tensor | None = None
        self._shares_weight = False
        self.train(module.training)
        self.quantize_weight()
        self.register_load_state_dict_pre_hook(self._before_load)
        self.register_load_state_dict_post_hook(self._after_load)

    def quantize_weight(self) -> None:
        """Quantize the original's weight as it is now.

        Raises:
            ConfigError: It holds NaN or Inf.
        """
        if self.weight_spec is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            quantized = round_nearest(self.module.weight, self.weight_spec)
            values = quantized.dequantize()
        if not quantized.scale.is_meta and not torch.isfinite(quantized.scale).all():
            raise ConfigError(
                f"The weight of operator {self.name!r} holds NaN or Inf, so it cannot be quantized. Check the "
                f"checkpoint, or exclude the operator with Rule({self.name!r}, skip=True)."
            )
        # Kept outside the buffers: a dtype change of the student must not round the quantized weight again.
        self._quantized_weight = values
        self.num_weight_scales = quantized.num_scales

    def drop_teacher(self) -> None:
        """Let go of the original's weight: its parameter shares the memory of the quantized one where dtypes allow.

        The parameter is replaced, not written to: another module may be tied to it.
        """
        old = self.module.weight
        if self._quantized_weight is not None and isinstance(old, nn.Parameter):  # else computed by a parametrization
            self._shares_weight = True
            self.module.weight = nn.Parameter(self._quantized_weight.to(old.dtype), requires_grad=old.requires_grad)

    @property
    def weight(self) -> Tensor:
        """The original's parameter; other code reads its dtype and device."""
        weight: Tensor = self.module.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The original's bias."""
        bias: Tensor | None = self.module.bias
        return bias

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original (``in_channels``, ``stride``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(super().__getattr__("module"), name)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input (equations 4 and 5) and apply the operator."""
        self.check(x)
        out_dtype = output_dtype(x)
        a = compute_input(x)
        if self.activation_spec is None:
            self.state.note(self.name, a.sum(), quantized=None)
        else:
            a = a.clone() if a is x else a
            low, high = fake_quantize_(a, self.partition(a.ndim), self.activation_spec)
            self.state.note(self.name, (high - low).sum(), quantized=True)
        return self.product(a, with_bias=True).to(out_dtype)

    def product(self, a: Tensor, with_bias: bool) -> Tensor:
        """``A(a)``, or ``A(a) + bias``, in the dtype of ``a``, whatever autocast says."""
        weight = self.module.weight if self._quantized_weight is None else self._quantized_weight
        bias = self.module.bias if with_bias else None
        weight, bias = weight.detach().to(a.dtype), None if bias is None else bias.detach().to(a.dtype)
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
        self.state.refuse_inside("moved or cast")
        quantized = self._quantized_weight
        super()._apply(fn, recurse)
        if quantized is not None:
            weight = self.module.weight
            self._quantized_weight = quantized.to(weight.device)
            if self._shares_weight and weight.dtype == quantized.dtype:
                weight.data = self._quantized_weight
        return self

    def _before_load(self, *_: Any) -> None:
        self.state.refuse_inside("loaded into")

    def _after_load(self, *_: Any) -> None:
        self.quantize_weight()
        if self._shares_weight:
            self.drop_teacher()

    def extra_repr(self) -> str:
        """Bits of both sides."""
        return f"weight={self.weight_spec}, activation={self.activation_spec}"


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the original would answer; autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def compute_input(x: Tensor) -> Tensor:
    """The input in the dtype of differences and scales: float32, or float64 when it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
