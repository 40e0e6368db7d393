"""The other ranks of a run: who is alive, who asked to stop, and who was lost; apart from the work's own messages."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from torch import distributed

BEAT_LIMIT = 20
"""Looks without a new beat after which a rank counts as lost."""
FIRST_BEAT_LIMIT = 60
TIMEOUT_S = 15


class StoreLost(Exception):
    """The process that holds the store of the process group does not answer."""


class Peers:
    """A second connection to the store by which the process group was made.

    Every rank counts up a number of its own there and watches that of the next one, so that a rank costs two small
    requests a look on any number of ranks. Only looks are counted, no clock is read: clocks of two machines may differ,
    and a machine that sleeps does not make others look dead.

    Args:
        rank: Of this process.
        world_size: Ranks in all.

    Raises:
        StoreLost: There is no store.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.neighbor = (rank + 1) % world_size
        self._beat, self._seen, self._quiet = 0, "", 0
        # A restarted group of torchrun finds the store of the one before, with what that left there.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = distributed.TCPStore(
                address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S)
            )
        except (RuntimeError, ValueError) as error:
            raise StoreLost(str(error)) from error
        self._store = distributed.PrefixStore(f"modiff/{attempt}", store)

    def beat(self, steps: int, still: int, where: str) -> None:
        """Show that this rank is alive.

        Args:
            steps: Of its work so far.
            still: Looks since the last of them.
            where: Its work is, in words.
        """
        self._beat += 1
        self._set(f"beat/{self.rank}", f"{self._beat}|{steps}|{still}|{where}")

    def neighbor_is_lost(self) -> bool:
        """Whether the next rank went silent."""
        found = self._get(f"beat/{self.neighbor}") or ""
        self._quiet = 0 if found != self._seen else self._quiet + 1
        self._seen = found
        return self._quiet >= (BEAT_LIMIT if found else FIRST_BEAT_LIMIT)

    def where(self, rank: int) -> tuple[int, int, str]:
        """What a rank said last: its steps, the looks since then, and where its work is."""
        _, steps, still, where = (self._get(f"beat/{rank}") or "0|0|0|starting").split("|", 3)
        return int(steps), int(still), where

    def post(self, what: str, value: dict[str, Any]) -> dict[str, Any]:
        """Say something that is said once, such as ``stop``; returns what was said first, by whichever rank."""
        try:
            text = self._store.compare_set(what, "", json.dumps(value)).decode()
        except RuntimeError as error:
            raise StoreLost(str(error)) from error
        return json.loads(text)

    def read(self, what: str) -> dict[str, Any] | None:
        """What was said; None where nothing was."""
        text = self._get(what)
        return json.loads(text) if text else None

    def acknowledge(self) -> None:
        """Say that this rank knows that the run ends."""
        self._set(f"knows/{self.rank}", "1")

    def ignorant(self) -> list[int]:
        """Ranks that do not know it yet."""
        return [rank for rank in range(self.world_size) if self._get(f"knows/{rank}") is None]

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise StoreLost(str(error)) from error

    def _get(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise StoreLost(str(error)) from error
