"""Which values a tensor holds, known without reading them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class InputIdentity:
    """Which values an input holds, known without reading them: its place in memory and PyTorch's count of writes.

    The weak reference keeps the memory's identity, not the memory: it cannot be mistaken for one that was freed.
    """

    storage: StorageWeakRef
    place: tuple[object, ...]

    @classmethod
    def of(cls, x: Tensor) -> InputIdentity | None:
        """The identity of a tensor; None where PyTorch counts no writes (inference tensors, tensor subclasses)."""
        place = _place(x)
        return None if place is None else cls(StorageWeakRef(x.untyped_storage()), place)

    def matches(self, x: Tensor) -> bool:
        """Whether ``x`` is that tensor, or an equal view of it, unchanged since."""
        return bool(_place(x) == self.place and x.untyped_storage()._cdata == self.storage.cdata)


@dataclass(frozen=True)
class KeptOutput:
    """What a module returned for an input, to be returned again while both are as they were."""

    source: InputIdentity
    output: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor, output: Tensor) -> KeptOutput | None:
        """None where PyTorch counts no writes."""
        source = InputIdentity.of(x)
        return None if source is None or output.is_inference() else cls(source, output, output._version)

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` is that input, unchanged, and nobody wrote to the output."""
        return self.output._version == self.version and self.source.matches(x)


def _place(x: Tensor) -> tuple[object, ...] | None:
    if type(x) not in (Tensor, nn.Parameter) or x.is_inference():
        return None
    return x.data_ptr(), x._version, x.dtype, x.shape, x.stride()
