"""Samples of a block's inputs and targets: in memory up to a limit, beyond it in safetensors shards on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modiff.calibration.loop.reduction import Reducer
from modiff.errors import CalibrationError
from modiff.storage.atomic import write_file


class SampleStore:
    """Rows of several tensors, appended in order and read by index; use it as a context manager.

    Only shards whose writing finished are known to the store: a file is written under a temporary name, flushed to disk
    and then renamed. The folder is the store's own: what an earlier process left there is deleted, and so is the
    folder when the store is closed or the disk is full.

    Args:
        folder: Where shards are put; made when the first is written.
        limit: Bytes held in memory before they are written to a shard.
        owner: The block or operator whose samples these are, for messages.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int, owner: str) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self.owner = owner
        self.peak_bytes = 0
        self._held: list[dict[str, Tensor]] = []
        self._held_bytes = 0
        self._shards: list[tuple[Path, int]] = []
        self._order: Tensor | None = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> SampleStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return sum(rows for _, rows in self._shards) + sum(_rows(part) for part in self._held)

    @property
    def num_shards(self) -> int:
        """How many shards lie on the disk."""
        return len(self._shards)

    def append(self, tensors: dict[str, Tensor]) -> None:
        """Add rows (dim 0, the same number in each tensor); they are copied to the CPU.

        Raises:
            CalibrationError: A single row is larger than the limit, or the disk is full.
        """
        rows = _rows(tensors)
        per_row = sum(t[0].numel() * t.element_size() for t in tensors.values()) if rows else 0
        if per_row > self.limit:
            raise CalibrationError(
                f"One sample of {self.owner!r} takes {per_row} bytes, but only {self.limit} may be held in memory. "
                "Raise memory_mib."
            )
        first = 0
        while first < rows:
            count = min(rows - first, (self.limit - self._held_bytes) // per_row)
            if count == 0:
                self._spill()
                continue
            # A copy: a view would keep the whole batch alive, which the limit does not count.
            part = {k: t[first : first + count].detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
            self._held.append(part)
            self._held_bytes += count * per_row
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
            first += count

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Read the rows at ``indices`` (int64 ``[n]``), in that order."""
        found: list[dict[str, Tensor]] = [{}] * len(indices)
        order = (indices if self._order is None else self._order[indices]).tolist()
        start = 0
        for path, count in self._shards:
            wanted = [(i, row - start) for i, row in enumerate(order) if start <= row < start + count]
            if wanted:
                with safe_open(path, framework="pt") as shard:
                    slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
                    for i, row in wanted:
                        found[i] = {key: slice_[row : row + 1] for key, slice_ in slices.items()}
            start += count
        for part in self._held:
            count = _rows(part)
            for i, row in enumerate(order):
                if start <= row < start + count:
                    found[i] = {key: t[row - start : row - start + 1] for key, t in part.items()}
            start += count
        if not all(found):
            raise IndexError(f"{order} are not all rows of a store of {len(self)}")
        return {key: torch.cat([row[key] for row in found]) for key in found[0]}

    def collect(self, keys: Sequence[int], reducer: Reducer, at_once: int = 16) -> None:
        """Bring the rows of all processes into the store of the first; a single process does nothing.

        Args:
            keys: Of this process's rows: the first store is then read in the order of all keys.
            reducer: The processes; each calls this.
            at_once: Rows of each that travel together.

        Raises:
            CalibrationError: As for :meth:`append`, in all of them.
        """
        if reducer.world_size == 1:
            return
        own = len(self)
        every, count = reducer.gather(list(keys)), max(reducer.gather(own))
        found = list(keys)
        for first in range(0, count, at_once):
            places = torch.arange(first, min(first + at_once, own)) if first < own else None
            parts = reducer.gather(None if places is None or reducer.rank == 0 else self.rows(places))
            reducer.once(lambda parts=parts: self._take(parts))  # type: ignore[misc]
            for part, others in zip(parts, every, strict=True):
                found += others[first : first + at_once] if part is not None else []
        if reducer.rank == 0:
            self._order = torch.tensor(found).argsort(stable=True)

    def _take(self, parts: Sequence[dict[str, Tensor] | None]) -> None:
        for part in parts:
            if part is not None:
                self.append(part)

    def close(self) -> None:
        """Forget all samples and delete the folder."""
        self._held, self._held_bytes, self._shards, self._order = [], 0, [], None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _spill(self) -> None:
        # One shard for each part that was appended: joining them first would take the memory twice.
        try:
            while self._held:
                part = self._held[0]
                path = self.folder / f"samples-{len(self._shards):05d}.safetensors"
                write_file(path, partial(save_file, part))
                self._shards.append((path, _rows(part)))
                self._held.pop(0)
        except (OSError, SafetensorError) as error:
            self.close()
            raise CalibrationError(
                f"The samples of {self.owner!r} do not fit on the disk at {self.folder}: {error}. What was written is "
                "deleted. Free space, give another folder, or lower samples."
            ) from error
        self._held_bytes = 0


def _rows(tensors: dict[str, Tensor]) -> int:
    return len(next(iter(tensors.values())))
