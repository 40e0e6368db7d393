"""The products of one evaluation, counted from shapes: operators' own, and all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count, shape_wrapper

from modiff.operators.adapters import OperatorAdapter
from modiff.operators.quantized import QuantizedOperator


@dataclass
class _Sum:
    macs: float = 0.0
    bops: float = 0.0


class ProductCounter:
    """Counts the multiply-accumulates of one evaluation: operators' from shapes, all others by PyTorch's counter."""

    def __init__(self) -> None:
        # PyTorch's registry lacks the attention of the CPU.
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops)}
        formulas = {op: self._recorded(formula) for op, formula in {**flop_registry, **attention}.items()}
        self._flops = FlopCounterMode(display=False, custom_mapping=formulas)
        self._depth = 0
        self.macs: dict[str, int] = {}
        self.bits: dict[str, int] = {}
        self.other: dict[str, _Sum] = {}
        self.block_of: dict[str, str] = {}
        self._block = ""
        self.inputs: dict[str, int] = {}

    def others(self, shares: Mapping[str, float]) -> tuple[float, float]:
        """Multiply-accumulates and bit operations outside of operators, for shares of evaluations that run a block."""
        parts = [(part, shares.get(block, 1.0)) for block, part in self.other.items()]
        return sum(part.macs * share for part, share in parts), sum(part.bops * share for part, share in parts)

    def _recorded(self, formula: Callable[..., int]) -> Callable[..., int]:
        """A formula that also sees the tensors: outside of operators, their dtype makes the bit operations."""

        def raw(*args: Any, **kwargs: Any) -> int:
            flops = int(formula(*args, **kwargs))
            if not self._depth:
                size = next((a.element_size() for a in args if isinstance(a, Tensor)), 4)
                part = self.other.setdefault(self._block, _Sum())
                part.macs += flops / 2  # PyTorch counts two operations for each multiply-accumulate
                part.bops += flops / 2 * (8 * size) ** 2
            return flops

        raw._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then hands over tensors, not shapes
        return raw

    @contextmanager
    def watch(
        self, found: dict[str, tuple[nn.Module, OperatorAdapter]], blocks: Mapping[str, nn.Module]
    ) -> Iterator[None]:
        """Count what runs inside, by block; fused attention layers, which hide their products, are off."""
        handles = [handle for name, (module, adapter) in found.items() for handle in self._hook(name, module, adapter)]
        # After the operators' own hooks, which then see a shortcut outside of its block.
        handles += [handle for name, block in blocks.items() for handle in self._hook_block(name, block)]
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self._flops:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for handle in handles:
                handle.remove()

    def _hook_block(self, name: str, block: nn.Module) -> list[Any]:
        shortcut = getattr(block, "conv_shortcut", None)

        def enter(_: nn.Module, __: Any) -> None:
            self._block = name

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self._block = ""

        handles = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
        if isinstance(shortcut, nn.Module):  # it runs in every evaluation
            handles.append(shortcut.register_forward_pre_hook(lambda *_: leave(block, None, None), prepend=True))
            handles.append(shortcut.register_forward_hook(lambda *_: enter(block, None)))
        return handles

    def _hook(self, name: str, module: nn.Module, adapter: OperatorAdapter) -> list[Any]:
        original = module.module if isinstance(module, QuantizedOperator) else module

        def before(_: nn.Module, __: Any) -> None:
            self._depth += 1

        def after(_: nn.Module, args: Any, output: Tensor) -> None:
            self._depth -= 1
            self.block_of[name] = self._block
            self.inputs[name] = max(self.inputs.get(name, 0), *(a.numel() for a in args if isinstance(a, Tensor)))
            self.macs[name] = self.macs.get(name, 0) + adapter.macs(original, output)
            self.bits[name] = 8 * output.element_size()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
