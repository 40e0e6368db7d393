"""Which operators read one vector per sample, and which stand at the denoiser's ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from modiff.config.quant import QuantConfig
from modiff.errors import ConfigError
from modiff.operators.adapters import OperatorAdapter, find_adapter
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.vectors import is_vector
from modiff.student.example import call_example

# Names of diffusers: embeddings of time, size, class, pooled text and guidance; their projections in resnets and in
# adaptive norms. tests/unit/test_special.py runs a tiny model of every family and compares.
_VECTORS = re.compile(
    r"(.*\.)?((time|add|class|time_text)_embedding|time_embed|adaln_single|(timestep|text|guidance|class)_embedder)\..*"
    r"|.*\.time_emb_proj|(.*\.)?norm(1|1_context|_out)?\.linear|proj_out_1"
)
_FIRST = ("conv_in", "pos_embed.proj", "x_embedder", "patch_embed.proj")
_LAST = ("conv_out", "proj_out_2", "proj_out")


def resolve(model: nn.Module, config: QuantConfig, example_inputs: Any = None) -> QuantConfig:
    """The config with the names of its special operators, as far as they are known before the first evaluation.

    Args:
        model: The denoiser, in full precision.
        config: Names that it gives are kept.
        example_inputs: Arguments of the denoiser's forward: a tuple, or a mapping of keywords. None: only diffusers'
            networks are known, by their structure.

    Raises:
        ConfigError: A name is not an operator's, or the denoiser cannot be called with the example.
    """
    wanted = [key for key in ("vectors", "ends") if getattr(config, key) is not None]
    if not wanted:
        return config
    known = _adapters(model)
    for key in wanted:
        names = getattr(config, key).names or ()
        missing = [name for name in names if name not in known]
        if missing:
            some = ", ".join(list(known)[:4])
            raise ConfigError(f"{key}.names has {missing[0]!r}, which is no operator. Names here are like: {some}.")
    open_ = [key for key in wanted if getattr(config, key).names is None]
    if not open_:
        return config
    found = _observed(model, known, example_inputs) if example_inputs is not None else _by_structure(model, known)
    if found is None:
        return config
    return replace(config, **{key: replace(getattr(config, key), names=found[key]) for key in open_})


def settled(config: QuantConfig, operators: Mapping[str, QuantizedOperator]) -> QuantConfig:
    """The config with the names that the first evaluation found; as it is while one of the operators is undecided."""
    vectors = config.vectors
    if vectors is None or vectors.names is not None or any(op.undecided is not None for op in operators.values()):
        return config
    names = tuple(name for name, operator in operators.items() if operator.found_vector)
    return replace(config, vectors=replace(vectors, names=names))


def _adapters(model: nn.Module) -> dict[str, OperatorAdapter]:
    found = {}
    for name, module in model.named_modules():
        try:
            adapter = find_adapter(module)
        except ConfigError:
            continue
        if adapter is not None:
            found[name] = adapter
    return found


def _by_structure(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]] | None:
    """Those of a network of diffusers; None for others."""
    if not any(cls.__module__.startswith("diffusers.models.") for cls in type(model).__mro__):
        return None
    names = list(names)
    ends = [next((name for name in those if name in names), None) for those in (_FIRST, _LAST)]
    return {
        "vectors": tuple(name for name in names if _VECTORS.fullmatch(name)),
        "ends": tuple(name for name in ends if name is not None),
    }


def _observed(model: nn.Module, known: Mapping[str, OperatorAdapter], example: Any) -> dict[str, tuple[str, ...]]:
    """Those that one evaluation shows: what each operator reads, and which are called first and last."""
    order: list[tuple[str, bool]] = []

    def watch(name: str, adapter: OperatorAdapter) -> Any:
        def before(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            vector = is_vector(x, adapter.kind, adapter.is_batched(module, x.ndim))
            order.append((name, vector))

        return model.get_submodule(name).register_forward_pre_hook(before)

    handles = [watch(name, adapter) for name, adapter in known.items()]
    try:
        call_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    spread = [name for name, vector in order if not vector]
    return {
        "vectors": tuple(name for name in dict.fromkeys(name for name, _ in order) if name not in spread),
        "ends": tuple(dict.fromkeys((spread[0], spread[-1]))) if spread else (),
    }
