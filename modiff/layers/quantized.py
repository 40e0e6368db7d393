"""Plain post-training quantization of one linear operator: the baseline, and the base of the modulated one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config import QuantSpec
from modiff.errors import TrajectoryError
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
        module: The original operator, kept untouched (``keep_teacher``) for :func:`modiff.restore`.
        name: Its qualified name.
        adapter: How its type applies a weight.
        weight: Weight spec or None.
        activation: Activation spec or None.
        state: Shared by all operators of the student.
        keep_teacher: Else the original's weight is replaced by the quantized one.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        adapter: OperatorAdapter,
        weight: QuantSpec | None,
        activation: QuantSpec | None,
        state: ModulationState,
        keep_teacher: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.adapter = adapter
        self.weight_spec = weight
        self.activation_spec = activation
        self.state = state
        self.keep_teacher = keep_teacher
        self.num_weight_scales = 0
        self._partitions: dict[int, Partition] = {}
        self._quantized_weight: Tensor | None = None
        self.train(module.training)
        if weight is not None:
            quantized = round_nearest(module.weight, weight)
            self.num_weight_scales = quantized.num_scales
            values = quantized.dequantize()
            # Kept outside the buffers: a dtype change of the student must not round the quantized weight again.
            self._quantized_weight = values.to(torch.promote_types(module.weight.dtype, torch.float32))
            if not keep_teacher:
                with torch.no_grad():
                    module.weight.copy_(values)

    @property
    def weight(self) -> Tensor:
        """The original's parameter; other code reads its dtype and device."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """The original's bias."""
        return self.module.bias

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
        self.refuse_gradients(x)
        out_dtype = self.output_dtype(x)
        a = compute_input(x)
        self.state.note_call(self.name)
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
        weight, bias = weight.to(a.dtype), None if bias is None else bias.to(a.dtype)
        if torch.is_autocast_enabled(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return self.adapter.apply(self.module, a, weight, bias)
        return self.adapter.apply(self.module, a, weight, bias)

    def partition(self, ndim: int) -> Partition:
        """Which elements of an input with ``ndim`` dims share a scale."""
        if ndim not in self._partitions:
            assert self.activation_spec is not None
            self._partitions[ndim] = activation_partition(self.activation_spec, ndim, self.adapter.kind)
        return self._partitions[ndim]

    def output_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the original would answer."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def refuse_gradients(self, x: Tensor) -> None:
        """Raise where a gradient would be asked for.

        Raises:
            TrajectoryError: The input requires a gradient.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise TrajectoryError(
                f"Operator {self.name!r} got an input that requires a gradient; a student has none (rounding has no "
                "slope). Run it under torch.no_grad()."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.state.refuse_inside("moved or cast")
        super()._apply(fn, recurse)
        if self._quantized_weight is not None:
            self._quantized_weight = self._quantized_weight.to(fn(self._quantized_weight).device)
        return self

    def extra_repr(self) -> str:
        """Bits of both sides."""
        return f"weight={self.weight_spec}, activation={self.activation_spec}"


def compute_input(x: Tensor) -> Tensor:
    """The input in the dtype of differences and scales: float32, or float64 when it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
