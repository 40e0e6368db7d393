"""Reads the file of an offline W&B run: records in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a ``.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    content, place, parts = path.read_bytes(), HEADER, b""
    assert content[:4] == b":W&B"
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # the rest of a block is padding
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + HEADER])
        parts += content[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class OfflineRun:
    """What an offline run holds."""

    run: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: dict[tuple[str, str], tuple[bool, list[str]]] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def keys(self) -> set[str]:
        """Of the history and the summary."""
        return {key for row in self.rows for key in row} | set(self.summary)

    def table(self, key: str) -> dict[str, Any]:
        """The content of the last table under a key."""
        value = next(row[key] for row in reversed(self.rows) if key in row)
        assert value["_type"] == "table-file"
        return json.loads((self.folder / "files" / value["path"]).read_text())


def unflatten(items: Any) -> dict[str, Any]:
    """Values by their key; those that are objects come in parts, by the path of keys."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = list(item.nested_key) or [item.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def read_offline(folder: Path) -> OfflineRun:
    """Read ``offline-run-*`` of W&B."""
    (path,) = folder.glob("*.wandb")
    found = OfflineRun(folder=folder)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
        elif kind == "history":
            found.rows.append(unflatten(record.history.item))
        elif kind == "summary":
            found.summary |= unflatten(record.summary.update)
        elif kind == "metric":
            name = record.metric.name or record.metric.glob_name
            found.axes[name] = record.metric.step_metric
        elif kind == "artifact":
            artifact = record.artifact
            files = [entry.path for entry in artifact.manifest.contents]
            found.artifacts[artifact.type, artifact.name] = (artifact.use_after_commit, files)
    return found
