"""Content hashes: SHA-256 of JSON, files and tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Bytes of a file that are read at once."""


def hash_text(text: str) -> str:
    """Hash a text: 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_json(value: Any) -> str:
    """Hash anything that JSON can hold; what it cannot hold counts as ``str`` writes it.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return hash_text(json.dumps(value, sort_keys=True, default=str))


def short_hash(value: Any) -> str:
    """Return the first 16 digits of :func:`hash_json`, for names of folders and runs."""
    return hash_json(value)[:16]


def hash_file(path: Path) -> str:
    """Hash a file's content."""
    return hash_files([path])


def hash_files(paths: Iterable[Path], trust_names: bool = False) -> str:
    """Hash the contents of files, one after the other.

    Args:
        paths: The files.
        trust_names: A link to a file that is named by its own SHA-256, as in the cache of the Hugging Face hub, counts
            by that name: the gigabytes behind it are not read.
    """
    digest = hashlib.sha256()
    for path in paths:
        blob = path.resolve().name
        if trust_names and path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob):
            digest.update(blob.encode())
            continue
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """Hash the bits of a tensor, in the order of its elements."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and bits of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def hash_bits(tensors: Iterable[Tensor]) -> str:
    """Hash the bits of tensors, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bits of a tensor in the order of its elements; a contiguous CPU tensor is not copied."""
    contiguous = tensor.detach().cpu().contiguous()
    flat = torch.empty(0, dtype=torch.uint8).set_(contiguous.untyped_storage())
    start = contiguous.storage_offset() * contiguous.element_size()
    return flat[start : start + contiguous.numel() * contiguous.element_size()].numpy().data
