"""Every parameter and buffer of a teacher or student, under the teacher's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modiff.operators.quantized import QuantizedOperator


@dataclass(frozen=True)
class Slot:
    """One place that holds a tensor; a tied tensor has several.

    Args:
        name: Qualified name in the teacher: a student's operators do not show in it.
        owner: The module that holds it.
        key: Its name there.
        buffer: Buffer, persistent or not; else a parameter.
        dropped: The quantized operator whose original weight was dropped, leaving this slot empty.
    """

    name: str
    owner: nn.Module
    key: str
    buffer: bool
    dropped: QuantizedOperator | None = None

    @property
    def tensor(self) -> Tensor:
        """What the slot holds now."""
        tensor = (self.owner._buffers if self.buffer else self.owner._parameters)[self.key]
        assert tensor is not None
        return tensor

    @property
    def shape(self) -> torch.Size:
        """Shape in the teacher."""
        return self.tensor.shape if self.dropped is None else self.dropped.weight_shape

    def put(self, tensor: Tensor) -> None:
        """Replace what the slot holds; the old tensor stays as it is."""
        if self.buffer:
            self.owner._buffers[self.key] = tensor
        else:
            assert isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.key] = tensor


def slots(model: nn.Module) -> Iterator[Slot]:
    """All slots of a teacher or student, in the order of the walk; modules with several names come under each."""
    inside: dict[str, tuple[str, QuantizedOperator]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedOperator):
            inside[f"{name}.module"] = (name, module)
            continue
        plain, operator = inside.get(name, (name, None))
        for buffer, tensors in ((False, module._parameters), (True, module._buffers)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    gone = operator if operator is not None and operator.dropped and key == "weight" else None
                    yield Slot(f"{plain}.{key}" if plain else key, module, key, buffer, gone)
