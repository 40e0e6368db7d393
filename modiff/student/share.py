"""Says which share of a student's work stays in full precision, once, from its first evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from modiff.operators.adapters import OperatorAdapter
from modiff.operators.quantized import QuantizedOperator
from modiff.trajectory.listeners import Listener

WARNED = 0.05
"""Share of the multiply-accumulates from which on a warning is worth a line."""


class FullPrecisionShare(Listener):
    """Counts multiply-accumulates in the first evaluation: only then their number is known.

    Args:
        quantized: Operators of the student by name.
        left: Modules that stay in full precision although no rule says so, by name, with an adapter that counts them;
            None: their weight is taken once for each place of their output.
    """

    def __init__(
        self, quantized: dict[str, QuantizedOperator], left: dict[str, tuple[nn.Module, OperatorAdapter | None]]
    ) -> None:
        self.quantized = quantized
        self.left = left
        self.macs: Counter[str] = Counter()
        self.handles: list[RemovableHandle] = []

    @override
    def before_evaluation(self, state: Any, arguments: Sequence[Tensor]) -> None:
        self.removed(state)
        if state.trajectory is None or not self.left:
            return
        for name, operator in self.quantized.items():
            self._watch(name, operator, operator.module, operator.adapter)
        for name, (module, adapter) in self.left.items():
            self._watch(name, module, module, adapter)

    def _watch(self, name: str, module: nn.Module, original: Any, adapter: OperatorAdapter | None) -> None:
        def count(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if adapter is not None:
                self.macs[name] += adapter.macs(original, first)
            else:
                weights = [p for p in original.parameters() if p.ndim > 1]
                self.macs[name] += sum(p.numel() * (first.numel() // p.shape[0]) for p in weights)

        self.handles.append(module.register_forward_hook(count))

    @override
    def after_evaluation(self, state: Any, output: Any) -> None:
        if not self.handles:
            return
        self.removed(state)
        whole, full = sum(self.macs.values()), sum(self.macs[name] for name in self.left)
        if whole and full / whole > WARNED:
            names = ", ".join(f"{n!r} ({m / whole:.0%})" for n, m in self.macs.most_common() if n in self.left and m)
            logging.getLogger("modiff").warning(
                "%.0f %% of the multiply-accumulates of this student stay in full precision, because modiff cannot "
                "quantize these modules: %s. modiff.describe(student) says why.",
                100 * full / whole,
                names,
            )
        self.left = {}

    @override
    def removed(self, state: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
