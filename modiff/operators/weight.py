"""The weight of a quantized operator: rounded, packed, and the original kept or dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError
from modiff.operators.dtypes import memory_format
from modiff.operators.wrapper import ModuleWrapper
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest


class WeightHolder(ModuleWrapper):
    """An operator's quantized weight beside its original.

    Args:
        module: The original operator, kept untouched for :func:`modiff.restore` (but see :meth:`drop_original`).
        name: Its qualified name.
        weight: Weight spec or None.
        packed: The quantized weight, if it is known already; else the original's is rounded to nearest.

    Raises:
        ConfigError: The weight is on the meta device, or holds NaN or Inf.
    """

    def __init__(self, module: Any, name: str, weight: QuantSpec | None, packed: PackedWeight | None) -> None:
        super().__init__()
        self.module: Any = module
        self.name = name
        self.weight_spec = weight
        self.dropped = False
        self.packed = packed
        # Kept outside the buffers: a dtype change of the student must not round the quantized weight again.
        self._quantized_weight: Tensor | None = None
        self.layout = memory_format(self.module.weight)
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
        self.packed, self._quantized_weight = packed, None
        self.quantized_weight()

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

    def _move_weight(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Bring the packed weight to where ``fn`` brings parameters."""
        if self.packed is None:
            return
        probe = torch.empty([2] * len(self.packed.shape), device=self.packed.codes.device)
        probe = fn(probe.to(memory_format=self.layout))
        self.layout = memory_format(probe)
        self.packed = self.packed.to(probe.device)
        if self._quantized_weight is not None:
            moved = self._quantized_weight.to(probe.device)
            self._quantized_weight = moved.contiguous(memory_format=self.layout)

    def _before_load(self, _: nn.Module, state_dict: Mapping[str, Any], prefix: str, *__: Any) -> None:
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
        if self.dropped:
            self.drop_original()
