"""The weight of a quantized operator: rounded, packed, and the original kept or dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError
from modiff.operators.adapters import OperatorAdapter
from modiff.operators.dtypes import memory_format
from modiff.operators.wrapper import ModuleWrapper
from modiff.quantizers.packing import PackedWeight
from modiff.quantizers.rounding import round_nearest


class WeightHolder(ModuleWrapper):
    """An operator's quantized weight beside its original.

    Args:
        module: The original operator, kept untouched for :func:`modiff.restore` (but see :meth:`drop_original`).
        name: Its qualified name.
        adapter: Of its type.
        weight: Weight spec or None.
        packed: The quantized weight, if it is known already; else the original's is rounded to nearest.

    Raises:
        ConfigError: The weight is on the meta device, or holds NaN or Inf.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        adapter: OperatorAdapter,
        weight: QuantSpec | None,
        packed: PackedWeight | None,
    ) -> None:
        super().__init__()
        self.module: Any = module
        self.adapter = adapter
        self.name = name
        self.weight_spec = weight
        self.dropped = False
        self.packed = packed
        # Kept outside the buffers: a dtype change of the student must not round the quantized weight again.
        self._quantized_weight: Tensor | None = None
        self.layout = memory_format(self.module.weight)
        self._given: Tensor | None = None
        self._marks: Tensor | None = None
        self._weight_arrives = False
        if packed is None:
            self.quantize_weight()
        self.register_load_state_dict_pre_hook(self._before_load)
        self.register_load_state_dict_post_hook(self._after_load)

    def __setattr__(self, name: str, value: Any) -> None:
        """A bias is the original's; another weight would not be quantized.

        Raises:
            ConfigError: A weight is assigned.
        """
        if name == "weight":
            raise ConfigError(
                f"The weight of operator {self.name!r} is quantized; another one assigned to it would be ignored. Call "
                "modiff.restore(student), change the weight, and quantize again."
            )
        if name == "bias":
            self.module.bias = value
        else:
            super().__setattr__(name, value)

    def quantize_weight(self) -> None:
        """Round the original's weight, as it is now, to nearest.

        Raises:
            ConfigError: It is on the meta device, or holds NaN or Inf.
        """
        weight = self.original_weight
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
        self.mark_weight()

    def quantized_weight(self) -> Tensor:
        """The values in the products, float32 (float64 for float64 weights); made at the first call, then kept."""
        if self._quantized_weight is None:
            assert self.packed is not None
            with torch.inference_mode(False), torch.no_grad():
                values = self.packed.unpack().dequantize()
                self._quantized_weight = values.contiguous(memory_format=self.layout)
                self.mark_weight()
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
        self.mark_weight()

    def weight_marks(self) -> Tensor:
        """Sums that tell the tensors apart that others may write to: int64, on the weight's device.

        The original's weight, because a student does not see what is written to it, and the quantized one, because
        other code is handed it.
        """
        found = [
            bit_sums(tensor)
            for tensor in (self.module.weight, self._quantized_weight, self._given)
            if tensor is not None and not tensor.is_meta and tensor.numel()
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def mark_weight(self) -> None:
        """Remember the weight as it is now."""
        self._marks = None if self.packed is None else self.weight_marks()

    def weight_changed(self) -> Tensor | None:
        """Whether the weight was written to since it was quantized: a flag on its device; None: nothing to compare."""
        if self.packed is None or self._marks is None:
            return None
        marks = self.weight_marks()
        if marks.shape != self._marks.shape:
            return torch.tensor(True, device=marks.device)
        return (marks != self._marks.to(marks.device)).any()

    @property
    def num_weight_scales(self) -> int:
        """How many scales the quantized weight has; 0 in full precision."""
        return 0 if self.packed is None else self.packed.scale.numel()

    @property
    def original_weight(self) -> Tensor:
        """The original's parameter as ``[out, in / groups, *kernel]``."""
        return self.adapter.canonical(self.module, self.module.weight)

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the original's weight."""
        if self.packed is None:
            shape: torch.Size = self.module.weight.shape
            return shape
        return self.adapter.native(self.module, torch.empty(self.packed.shape, device="meta")).shape

    @property
    def weight(self) -> Tensor:
        """What other code gets that multiplies by the weight itself: the quantized values in the original's dtype.

        They are the same for a student that kept its teacher, dropped it or was loaded. The original's parameter is
        ``module.weight``.
        """
        weight: Tensor = self.module.weight
        if self.packed is None:
            return weight
        values = self.adapter.native(self.module, self.quantized_weight())
        if values.dtype == weight.dtype:
            return values
        if self._given is None or self._given.dtype != weight.dtype or self._given.device != values.device:
            self._given = values.to(weight.dtype)
            self.mark_weight()
        return self._given

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
        self._given = None
        self.mark_weight()

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
        self.mark_weight()


def bit_sums(tensor: Tensor) -> Tensor:
    """Two sums over a tensor's bits, weighted by row and by column: int64 ``[2]``, on its device.

    A value that changes, and rows or columns that are exchanged, change them. PyTorch's count of writes does not see
    ``.data``.

    >>> x = torch.arange(6.0).reshape(2, 3)
    >>> torch.equal(bit_sums(x), bit_sums(x.clone())), torch.equal(bit_sums(x), bit_sums(x.flip(0)))
    (True, False)
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().view(whole)
    bits = bits.reshape(1, -1) if bits.ndim < 2 else bits
    rows, columns = bits.sum(dim=tuple(range(1, bits.ndim))), bits.sum(dim=0).reshape(-1)
    return torch.stack([(part * _odd(part)).sum() for part in (rows, columns)])


def _odd(like: Tensor) -> Tensor:
    return torch.arange(1, 2 * len(like), 2, device=like.device)
