"""The rest of a network in bfloat16: what flows between its first and its last layer is rounded, and half as large."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from modiff.errors import ConfigError
from modiff.trajectory.session import Listener, ModulationState

ENTRIES = ("conv_in", "pos_embed")
EXITS = ("conv_norm_out", "norm_out")


class Bfloat16(Listener):
    """Casts at the entry and the exit of a denoiser, so that its input and its output keep their precision.

    Operators hold their states in float32 all the same.

    Args:
        student: The denoiser.

    Raises:
        ConfigError: It has no such layers.
    """

    def __init__(self, student: nn.Module) -> None:
        entry, leave = (_child(student, names) for names in (ENTRIES, EXITS))
        self.handles = [
            entry.register_forward_hook(lambda _module, _args, output: _cast(output, torch.bfloat16)),
            leave.register_forward_pre_hook(lambda _module, args: tuple(_cast(x, torch.float32) for x in args)),
        ]
        for module in student.modules():
            if getattr(module, "is_cross_attention", False):
                self.handles += _like_the_query(module)

    @override
    def removed(self, state: ModulationState) -> None:
        """Leave everything in its own precision again."""
        for handle in self.handles:
            handle.remove()


def _like_the_query(attention: Any) -> list[Any]:
    """Hooks that give keys and values of a prompt, which does not come from the first layer, the dtype of the query."""
    dtypes = [torch.float32]

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        dtypes[0] = args[0].dtype

    def cast(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _cast(output, dtypes[0])

    operators = (attention.to_k, attention.to_v)
    return [attention.register_forward_pre_hook(note), *(o.register_forward_hook(cast) for o in operators)]


def _child(student: nn.Module, names: tuple[str, ...]) -> nn.Module:
    children = dict(student.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise ConfigError(
        f"compute_dtype is 'bfloat16', but {type(student).__name__} has no layer {' or '.join(names)}, between which "
        "the network could run in it. Leave compute_dtype out, or cast the model itself before modiff.quantize."
    )


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16) else x
