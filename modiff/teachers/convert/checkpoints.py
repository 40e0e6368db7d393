"""Original checkpoints: reading them safely, and filling a diffusers module from them with a strict report."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modiff.errors import CheckpointError

State = Mapping[str, Tensor]
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "model.")


@dataclass(frozen=True)
class Source:
    """Where one tensor of a diffusers module comes from.

    Args:
        key: Key in the original state dict.
        rows: Output channels to take, int64; None: all. Trailing dims of size 1 that the target lacks are dropped (a
            1x1 convolution that diffusers writes as a Linear).
    """

    key: str
    rows: Tensor | None = None

    def take(self, tensor: Tensor, ndim: int) -> Tensor:
        """Take the part of the original tensor, with ``ndim`` dims."""
        tensor = tensor if self.rows is None else tensor[self.rows]
        while tensor.ndim > ndim and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        return tensor


def read_checkpoint(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """Read the state dict of a ``.safetensors`` file, or of a pickle that holds tensors and plain containers only.

    Takes the state dict itself, or finds it under ``state_dict`` (Lightning), ``ema`` / ``model`` (DiT), ``module``
    (DeepSpeed), ``model_state_dict`` and the like, or in the list that the DDIM repository writes (model, optimizer,
    epoch, step, average); drops the prefixes that wrappers add to every key (``module.``, ``_orig_mod.``, ``model.``,
    ``ema_model.``) and the counter of an average.

    Args:
        path: The file.
        ema: Take the averaged weights where the file holds both as separate state dicts. The averages inside a CompVis
            state dict (``model_ema.*``) are the converter's matter.

    Returns:
        Tensors on the CPU, by their original keys.

    Raises:
        CheckpointError: The file is missing, damaged, needs more than tensors, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r}. Give the path of a checkpoint that is on this machine.")
    content = _read(path)
    if isinstance(content, (list, tuple)) and content:
        content = content[4] if ema and len(content) > 4 else content[0]
    for _ in range(3):  # a wrapper may hold another one
        inner = next((k for k in _wrappers(ema) if isinstance(content, Mapping) and _holds(content.get(k))), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = list(map(str, content))[:10] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{str(path)!r} holds no state dict (found: {found}). Save the model's state_dict() "
            "alone and give that file."
        )
    state = {str(key): value for key, value in content.items()}
    state.pop("n_averaged", None)
    return _unwrapped(state)


def _wrappers(ema: bool) -> tuple[str, ...]:
    """Keys under which a state dict may lie, the wanted ones first."""
    averaged, plain = (
        ("ema", "ema_state_dict", "model_ema", "ema_model"),
        ("model", "model_state_dict", "module", "net"),
    )
    return ("state_dict", *(averaged + plain if ema else plain + averaged))


def _holds(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that every key has; those that converters of CompVis and Q-Diffusion look for stay."""
    for prefix in PREFIXES * 2:
        if state and all(key.startswith(prefix) for key in state):
            shorter = strip(state, prefix)
            quantized = any("quantizer." in key for key in state)  # Q-Diffusion's, whose converter knows the prefix
            if not quantized and not all(key.startswith("diffusion_model.") for key in shorter):
                state = shorter
    return state


def _other_kind(path: Path) -> str | None:
    """What a file is that is not a checkpoint although it may be named like one."""
    with path.open("rb") as stream:
        start = stream.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file it points to. Fetch that with `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, such as a login or an error. Download the file itself"
    if start.startswith((b"{", b"[")) and path.suffix != ".safetensors":
        return "a JSON file. Give the file with the weights"
    return "empty. Download it again" if not start else None


def _read(path: Path) -> Any:
    kind = _other_kind(path)
    if kind is not None:
        raise CheckpointError(f"{str(path)!r} is {kind}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors{f' ({wanted[1]})' if wanted else ''}; loading it could run code, "
            "and modiff reads tensors only. If you trust the file, convert it once where the libraries it needs "
            "are there, torch.save(torch.load(path, weights_only=False)['state_dict'], 'new.pt'), and give new.pt."
        ) from error
    except Exception as error:  # both readers raise many kinds on a damaged file
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}). It is damaged or no "
            "checkpoint: download it again."
        ) from error


def strip(state: State, prefix: str) -> dict[str, Tensor]:
    """Return the entries below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def require(state: State, keys: Iterable[str], what: str) -> None:
    """Check that a state dict is of the expected kind at all.

    Raises:
        CheckpointError: A key is missing; the message names the first keys that are there.
    """
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(
            f"This is not {what}: {_listed(missing)} missing. The file holds {_listed(list(state))}. Give a "
            "checkpoint of that kind, or use the converter for this one."
        )


def count(state: State, pattern: str) -> int:
    r"""Count the entries of a module list, from the largest index that a pattern's group finds.

    >>> count({"down.0.block.1.bias": 0, "down.2.x": 0}, r"down\.(\d+)\.")
    3
    """
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found) + 1 if found else 0


def fill(module: nn.Module, sources: Mapping[str, Source], state: State, what: str) -> None:
    """Copy an original state dict into a module; nothing may be missing, left over or of another shape.

    Args:
        module: A diffusers module, filled in place and set to evaluation mode.
        sources: For each entry of the module's state dict, where it comes from.
        state: The original state dict, without what belongs to other modules.
        what: Named in the error.

    Raises:
        CheckpointError: They differ; the first ten keys of each kind are named, in the original naming.
    """
    targets = module.state_dict()
    missing = sorted({s.key for name in targets if (s := sources[name]).key not in state})
    unexpected = sorted(set(state) - {sources[name].key for name in targets})
    values, shapes = {}, []
    for name, target in targets.items():
        source = sources[name]
        if source.key not in state:
            continue
        values[name] = source.take(state[source.key], target.ndim)
        if values[name].shape != target.shape:
            shapes.append(f"{source.key} {list(state[source.key].shape)}, not for {list(target.shape)}")
    parts = [
        f"{len(keys)} {kind}: {_listed(keys)}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"The checkpoint does not fit {what}. Keys {'; '.join(parts)}. Give the file and the "
            "options that belong together."
        )
    module.load_state_dict(values, strict=True)
    module.eval()


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 10} more" if len(keys) > 10 else ""
    return ", ".join(map(repr, keys[:10])) + more
