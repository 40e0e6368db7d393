"""Save and load a student: weights packed at their true width, everything else as it is."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modiff.config.quant import QuantConfig
from modiff.config.specs import STATE_DTYPES
from modiff.errors import CheckpointError, ConfigError, ModiffError
from modiff.operators.adapters import find_adapter
from modiff.operators.dtypes import memory_format
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.rewrites import rewrite, undo
from modiff.quantizers.calibrated import ranges_from_tensors, ranges_to_tensors
from modiff.quantizers.packing import PackedWeight
from modiff.storage.folder import check_target, dtype_name, read_manifest, read_tensors, write
from modiff.student.special import settled
from modiff.student.swap import RECORD, Record, convert, operators, plan
from modiff.student.tensors import Slot, slots
from modiff.trajectory.session import require_module, state_of, tensors_of

STRUCTURE = (KeyError, IndexError, TypeError, AttributeError, ValueError, AssertionError, RuntimeError, OverflowError)
"""What a manifest with members of another kind than :func:`save` writes may raise."""
REGISTERED = ("_parameters", "_buffers", "_modules")
IGNORED_FIELDS = ("sample_size",)
"""Fields of a denoiser's configuration that do not change what it computes."""


def save(
    student: nn.Module,
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    teacher: str | None = None,
    origin: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a student to a directory: ``model.safetensors`` and ``config.json``, all of it or nothing.

    Weight codes take their true width (2 to 8 bits); calibrated ranges are kept as they are. Whatever is not quantized
    (biases, norms, skipped operators, buffers) is the remainder.

    Args:
        student: What :func:`modiff.quantize` or :func:`modiff.load` returned.
        path: The directory to be made.
        dtype: In which the remainder's floats are stored: ``float32``, ``float16`` or ``bfloat16``; None: as they are.
            Narrower ones lose bits: the loaded student's outputs then differ.
        teacher: Where the teacher is to be found (a name or address); kept in ``config.json`` for the reader.
        origin: How the student was made, such as its calibration; anything JSON can hold, kept like ``teacher``.
        overwrite: Replace a checkpoint that lies there.

    Returns:
        The directory.

    Raises:
        CalibrationError: An operator's range is to be calibrated and is not.
        CheckpointError: The target is not empty or cannot be written, or the remainder does not fit ``dtype``.
        ConfigError: ``dtype`` or ``teacher`` is of another kind.
        TrajectoryError: The module is not a student, or a trajectory is open.
    """
    state_of(student).refuse_inside("saved")
    dtype = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if dtype is not None and dtype not in STATE_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed are {', '.join(STATE_DTYPES)} or None.")
    if teacher is not None and not isinstance(teacher, str):
        raise ConfigError(f"teacher is a {type(teacher).__name__}; give a name or address, or None.")
    target = Path(path).resolve()
    check_target(target, overwrite)
    record: Record = getattr(student, RECORD)
    tensors: dict[str, Tensor] = {}
    packed = _add_packed(operators(student), tensors)
    lengths = _add_ranges(operators(student), tensors)
    remainder = _add_remainder(student, tensors, None if dtype is None else getattr(torch, dtype))
    manifest = {
        "denoiser": _denoiser(student),
        "teacher": teacher,
        "origin": None if origin is None else dict(origin),
        "quant_config": dataclasses.asdict(settled(record.config, operators(student))),
        "shapes": {slot.name: list(slot.shape) for slot in slots(student)},
        "operators": packed,
        "calibrated_evaluations": lengths,
        "in_float": [name for name, operator in operators(student).items() if operator.in_float],
        "remainder": remainder,
    }
    write(target, manifest, tensors, overwrite)
    return target


def load(path: str | os.PathLike[str], model: nn.Module, *, keep_teacher: bool = True) -> nn.Module:
    """Make a denoiser the student that was saved; its outputs are the same bit for bit.

    Everything is read, verified and built before the model is touched: an error leaves it as it was. On a model on the
    meta device (``with torch.device("meta")``) no full-precision weight is made: the operators hold packed integers, of
    which the simulated products make each operator's values at its first call.

    Args:
        path: The directory that :func:`save` wrote.
        model: A denoiser of the same architecture; its weights may be any, or be on the meta device. Tensors take the
            dtype, device and layout that the model's have; on the meta device, the student's dtype and layout, and the
            CPU.
        keep_teacher: Keep the weights that the model holds, if it does: ``restore(student, teacher=student)`` then
            gives them back. Else they are freed.

    Returns:
        The same module, now the student; :func:`modiff.restore` needs ``teacher=...``.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, of a newer format, or of another architecture (the message
            says which tensor and which shape).
        ConfigError: The model is a student already.
    """
    require_module(model)
    if any(isinstance(module, QuantizedOperator) for module in model.modules()):
        raise ConfigError("The model is a student already. Call modiff.restore(student, ...) before modiff.load.")
    source = Path(path).resolve()
    manifest = read_manifest(source)
    try:
        return _load(source, manifest, model, keep_teacher)
    except (ModiffError, torch.OutOfMemoryError):
        raise
    except STRUCTURE as error:
        raise CheckpointError(
            f"{source}: its config.json does not describe a student ({type(error).__name__}: {str(error)[:200]}). It "
            "was edited or is damaged: copy or save the checkpoint again."
        ) from error


def _load(source: Path, manifest: dict[str, Any], model: nn.Module, keep_teacher: bool) -> nn.Module:
    """:func:`load` of a manifest that was read."""
    try:
        config = QuantConfig.from_dict(manifest["quant_config"])
    except ConfigError as error:
        raise CheckpointError(f"{source}: its quantization is not known to this release: {error}") from error
    try:
        changed = rewrite(model, config, loading=True)
    except ConfigError as error:
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {error}") from error
    try:
        return _fill(source, manifest, config, model, keep_teacher)
    except Exception:
        if changed and not hasattr(model, RECORD):
            undo(model)
        raise


def _fill(
    source: Path, manifest: dict[str, Any], config: QuantConfig, model: nn.Module, keep_teacher: bool
) -> nn.Module:
    """Make the model the saved student."""
    targets = list(slots(model))
    _check_architecture(source, manifest, model, targets)
    _check_operators(source, manifest, model, config)
    with torch.inference_mode(False), torch.no_grad():
        tensors = read_tensors(source, manifest)
        weights = _packed_weights(manifest, model, config, tensors)
        ranges = ranges_from_tensors(tensors, manifest.get("calibrated_evaluations", {}))
        # A parameter of a packed weight stays where it is; converting drops it, or keeps it for the teacher.
        changes = _changes(manifest, targets, tensors)
        on_meta = any(slot.tensor.is_meta for slot in targets)
        student = convert(model, config, keep_teacher and not on_meta, weights, ranges)
        record: Record = getattr(student, RECORD)
        record.loaded = True
        if record.keep_teacher:
            record.replaced = [(slot, old) for slot, old, _ in changes]
        for slot, _, new in changes:
            slot.put(new)
        for name, operator in operators(student).items():
            operator.in_float = name in manifest.get("in_float", [])
            if operator.dropped and on_meta:
                entry = manifest["operators"][name]
                operator.drop_original(getattr(torch, entry["dtype"]), getattr(torch, entry["layout"]))
    return student


def _add_packed(quantized: Mapping[str, QuantizedOperator], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Collect codes, scales and zero points; return dtype and layout of each original weight."""
    found = {}
    for name, operator in quantized.items():
        packed = operator.packed
        if packed is None:
            continue
        found[name] = {"dtype": dtype_name(operator.module.weight.dtype), "layout": _layout(operator.layout)}
        tensors.update(packed.tensors(f"{name}.weight"))
    return found


def _add_ranges(quantized: Mapping[str, QuantizedOperator], tensors: dict[str, Tensor]) -> dict[str, int]:
    """Collect calibrated scales and zero points; return the length of the trajectories that they are for."""
    for operator in quantized.values():
        operator.require_range()
    found = {name: operator.calibrated for name, operator in quantized.items() if operator.calibrated is not None}
    added, lengths = ranges_to_tensors(found)
    tensors.update(added)
    return lengths


def _add_remainder(student: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Any]:
    """Collect what is not quantized; return dtype, layout and stored name of each tensor; tied ones are stored once."""
    remainder: dict[str, Any] = {}
    stored: dict[int, str] = {}
    packed = {id(operator.module) for operator in operators(student).values() if operator.packed is not None}
    for slot in slots(student):
        if slot.key == "weight" and id(slot.owner) in packed:
            continue
        tensor = slot.tensor.detach()
        key = stored.setdefault(id(slot.tensor), slot.name)
        remainder[slot.name] = {
            "dtype": dtype_name(tensor.dtype),
            "layout": _layout(memory_format(tensor)),
            "tensor": key,
        }
        if key == slot.name:
            tensors[key] = _cast(slot.name, tensor, dtype).cpu().clone(memory_format=torch.contiguous_format)
    return remainder


def _layout(layout: torch.memory_format) -> str:
    return str(layout).removeprefix("torch.")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not torch.equal(torch.isfinite(cast), torch.isfinite(tensor)):
        raise CheckpointError(f"{name!r} holds values beyond {dtype_name(dtype)}. Use dtype='bfloat16' or None.")
    return cast


def _denoiser(model: nn.Module) -> dict[str, Any]:
    """Class and configuration of a denoiser; the latter by the habits of diffusers and transformers."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    plain = json.loads(json.dumps(dict(config), default=str)) if isinstance(config, Mapping) else None
    return {"class": f"{type(model).__module__}.{type(model).__qualname__}", "config": plain}


def _check_architecture(source: Path, manifest: dict[str, Any], model: nn.Module, targets: list[Slot]) -> None:
    saved, given = manifest["denoiser"], _denoiser(model)
    advice = "Give a model of the architecture that was saved: config.json holds its class and configuration."
    theirs = manifest["shapes"]
    ours = {slot.name: list(slot.shape) for slot in targets}
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            there, here = (f"has shape {s[name]}" if name in s else "is missing" for s in (theirs, ours))
            raise CheckpointError(
                f"{source} is of another architecture ({saved['class']}): {name!r} {there} in the checkpoint, and "
                f"{here} in this {type(model).__name__}. {advice}"
            )
    fields, own = saved["config"] or {}, given["config"] or {}
    for key in fields.keys() & own.keys():
        if fields[key] != own[key] and not key.startswith("_") and key not in IGNORED_FIELDS:
            raise CheckpointError(
                f"{source} is of another architecture: {key} is {fields[key]!r} in the checkpoint, and {own[key]!r} in "
                f"this {type(model).__name__}. {advice}"
            )
    if saved["class"].rpartition(".")[2] != type(model).__name__:
        raise CheckpointError(f"{source} is of a {saved['class']}, but the model is a {given['class']}. {advice}")
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in REGISTERED and any(tensor.is_meta for tensor in tensors_of(value)):
                raise CheckpointError(
                    f"{name}.{key} is a tensor on the meta device that is neither parameter nor buffer, so no "
                    "checkpoint holds it. Build the model inside `with accelerate.init_empty_weights():` instead of "
                    "torch.device('meta'), which leaves such tensors on the CPU; or build it on the CPU."
                )


def _check_operators(source: Path, manifest: dict[str, Any], model: nn.Module, config: QuantConfig) -> None:
    try:
        rows = [row for row in plan(model, config) if row.skipped is None]
    except ConfigError as error:
        raise CheckpointError(f"{source} does not fit this {type(model).__name__}: {error}") from error
    quantized = {row.name for row in rows if row.weight is not None}
    calibrated = {row.name for row in rows if row.activation is not None and row.activation.range == "calibrated"}
    lost = sorted(calibrated ^ set(manifest.get("calibrated_evaluations", {})))
    if lost:
        raise CheckpointError(
            f"{source} does not fit this {type(model).__name__}: the input of operator {lost[0]!r} has a calibrated "
            f"range in {'this model' if lost[0] in calibrated else 'the checkpoint'} only. Give a model of the "
            "architecture that was saved."
        )
    odd = sorted(quantized ^ set(manifest["operators"]))
    if odd:
        where = "in the checkpoint only" if odd[0] in manifest["operators"] else "in this model only"
        raise CheckpointError(
            f"{source} is of another architecture: the weight of operator {odd[0]!r} is quantized {where}. "
            "Give a model of the architecture that was saved."
        )


def _packed_weights(
    manifest: dict[str, Any], model: nn.Module, config: QuantConfig, tensors: dict[str, Tensor]
) -> dict[str, PackedWeight]:
    weights = {}
    for row in plan(model, config):
        if row.name not in manifest["operators"]:
            continue
        assert row.weight is not None
        module = model.get_submodule(row.name)
        adapter = find_adapter(module)
        assert adapter is not None
        weight: Tensor = module.weight  # type: ignore[assignment]
        device = torch.device("cpu") if weight.is_meta else weight.device
        shape = adapter.canonical(module, torch.empty(weight.shape, device="meta")).shape
        packed = PackedWeight.from_tensors(tensors, f"{row.name}.weight", shape, row.weight)
        weights[row.name] = packed.to(device)
    return weights


def _changes(
    manifest: dict[str, Any], targets: list[Slot], tensors: dict[str, Tensor]
) -> list[tuple[Slot, Tensor, Tensor]]:
    """Old and new tensor of each slot of the remainder where they differ; tied slots get the same one."""
    changes = []
    made: dict[tuple[int, str], Tensor] = {}
    for slot in targets:
        entry = manifest["remainder"].get(slot.name)
        if entry is None:
            continue
        old = slot.tensor
        key = (id(old), entry["tensor"])
        if key not in made:
            dtype = getattr(torch, entry["dtype"]) if old.is_meta else old.dtype
            layout = getattr(torch, entry["layout"]) if old.is_meta else memory_format(old)
            new = tensors[entry["tensor"]].to(torch.device("cpu") if old.is_meta else old.device, dtype)
            new = new.contiguous(memory_format=layout)
            if not old.is_meta and torch.equal(new, old):
                new = old
            elif not slot.buffer:
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            made[key] = new
        if made[key] is not old:
            changes.append((slot, old, made[key]))
    return changes
