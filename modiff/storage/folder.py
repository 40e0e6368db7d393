"""A directory of ``config.json`` and ``model.safetensors``: written whole or not at all, verified when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from importlib import metadata
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modiff.errors import CheckpointError
from modiff.storage.atomic import write_folder
from modiff.storage.hashing import hash_json, hash_tensor, raw_bytes

CONFIG, TENSORS = "config.json", "model.safetensors"
FORMAT = "modiff checkpoint"
FORMAT_VERSION = 2
"""1 knew no calibrated ranges of activations."""
READABLE = (1, 2)
REQUIRES = "0.1.0"
"""First release of modiff that reads ``FORMAT_VERSION``; raise both together."""


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a target that holds something.

    Args:
        path: Where a checkpoint is to be written.
        overwrite: A checkpoint that lies there may be replaced; other files never.

    Raises:
        CheckpointError: The target is a file, holds files of another kind, or a checkpoint that may not be replaced.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; a checkpoint is a directory. Give another path.")
    names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    foreign = sorted(names - {CONFIG, TENSORS})
    if foreign or (names and _format_of(path) != FORMAT):
        named = foreign[0] if foreign else CONFIG
        raise CheckpointError(
            f"{path} holds files that are not a checkpoint of modiff ({named}), which are never overwritten. "
            "Give a new or empty directory."
        )
    if names and not overwrite:
        raise CheckpointError(f"{path} holds a checkpoint already. Give another path, or overwrite=True to replace it.")


def write(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor], overwrite: bool = False) -> None:
    """Write a checkpoint atomically: readers see all of it or nothing.

    Args:
        path: The directory; its parents are made.
        manifest: What ``config.json`` says besides format, versions and hashes; anything that JSON can hold.
        tensors: On the CPU, contiguous, no two in the same memory.
        overwrite: Replace a checkpoint that lies there.

    Raises:
        CheckpointError: The target is refused (:func:`check_target`) or cannot be written; it is then unchanged.
    """
    check_target(path, overwrite)
    try:
        write_folder(path, lambda temporary: _write_into(temporary, manifest, tensors))
    except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
        raise CheckpointError(f"{path} cannot be written: {error}. Check the path, its rights and the disk.") from error


def _write_into(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    with open(folder / TENSORS, "rb") as file:
        header = _header_bytes(file)
    complete = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "requires": f"modiff>={REQUIRES}",
        "versions": _versions(),
        **manifest,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "tensors": {name: _entry(tensor) for name, tensor in tensors.items()},
    }
    complete["sha256"] = hash_json(complete)
    (folder / CONFIG).write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and verify ``config.json``.

    Raises:
        CheckpointError: It is missing, damaged, of another kind, or of a format that a newer release writes.
    """
    file = path / CONFIG
    if not file.is_file() or not (path / TENSORS).is_file():
        missing = path if not path.is_dir() else file if not file.is_file() else path / TENSORS
        raise CheckpointError(f"{missing} does not exist. Give a directory that modiff.save wrote.")
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Copy or save the checkpoint again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not of a checkpoint of modiff. Give a directory that modiff.save wrote.")
    version = manifest.get("format_version")
    if version not in READABLE:
        raise CheckpointError(
            f"{path} has format version {version!r}; this release of modiff reads versions "
            f"{' and '.join(map(str, READABLE))}. It needs "
            f"{manifest.get('requires')} (written by {_written_by(manifest)}): install that release."
        )
    if manifest.pop("sha256", None) != hash_json(manifest):
        raise CheckpointError(f"{file} is damaged or was edited: its hash differs. Copy or save the checkpoint again.")
    return manifest


def read_tensors(path: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Read and verify ``model.safetensors``; the memory it takes is that of its tensors.

    Args:
        path: The directory.
        manifest: What :func:`read_manifest` returned.

    Returns:
        Every tensor, on the CPU, in memory of its own (a mapped file could change after it was verified).

    Raises:
        CheckpointError: The file is truncated, a tensor is missing, or its content differs from what was saved.
    """
    source, entries = path / TENSORS, manifest["tensors"]
    again = "Copy or save the checkpoint again."
    try:
        with open(source, "rb") as file:
            raw = _header_bytes(file)
            header = json.loads(raw)
            header.pop("__metadata__", None)
            lost = sorted(set(entries) ^ set(header))
            if lost:
                what = "is missing" if lost[0] in entries else "is not known to config.json"
                raise CheckpointError(f"{source}: tensor {lost[0]!r} {what}. {again}")
            if hashlib.sha256(raw).hexdigest() != manifest["header_sha256"]:
                raise CheckpointError(f"{source}: its header is damaged or was edited: the hash differs. {again}")
            start = file.tell()
            size = os.fstat(file.fileno()).st_size
            expected = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size != expected:
                kind = "is truncated" if size < expected else "is too long"
                raise CheckpointError(f"{source} {kind}: {size} bytes of {expected}. {again}")
            tensors = {}
            for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
                file.seek(start + header[name]["data_offsets"][0])
                tensors[name] = _read_tensor(file, entries[name])
                if hash_tensor(tensors[name]) != entries[name]["sha256"]:
                    raise CheckpointError(f"{source}: tensor {name!r} is damaged: its hash differs. {again}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} is truncated or damaged: {error}. {again}") from error
    return tensors


def _read_tensor(file: BufferedReader, entry: dict[str, Any]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
    file.readinto(raw_bytes(tensor))
    return tensor


def _header_bytes(file: BufferedReader) -> bytes:
    """Read the JSON header of a safetensors file: its length in 8 bytes, then the text."""
    prefix = file.read(8)
    size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
    if not 0 <= size <= os.fstat(file.fileno()).st_size - 8:
        raise ValueError("the header is cut off")
    return file.read(size)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "sha256": hash_tensor(tensor)}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as in ``torch.<name>``.

    >>> dtype_name(torch.float16)
    'float16'
    """
    return str(dtype).removeprefix("torch.")


def _format_of(path: Path) -> Any:
    try:
        manifest = json.loads((path / CONFIG).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest.get("format") if isinstance(manifest, dict) else None


def _written_by(manifest: dict[str, Any]) -> str:
    versions = manifest.get("versions")
    return f"modiff {versions.get('modiff')}" if isinstance(versions, dict) else "an unknown release"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("modiff", "torch", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a source tree that was never installed
            found[name] = None
    return found
