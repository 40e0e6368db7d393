"""Training whose random numbers depend on the seed and on the image, on any number of ranks, and after any stop."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import distributed


class IndexSeeded(LightningModule):
    """A module that draws what it can by image number, and goes on with the global random numbers of every rank.

    Batches hold ``number`` int64 ``[B]`` (:class:`modiff.lit.data.batches.DeviceBatches`). What a network draws by
    itself, such as dropout, comes from the global generator: each rank has another one, and a checkpoint holds the
    states of all of them.
    """

    random_seed = 0

    def __init__(self) -> None:
        super().__init__()
        self._random_states: list[dict[str, Any]] | None = None

    def on_fit_start(self) -> None:
        """Take the seed of the run, before ranks part."""
        self.random_seed = torch.initial_seed()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the global random numbers of all ranks."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        mine = {"cpu": torch.get_rng_state(), "cuda": cuda, "seed": self.random_seed}
        states = [mine]
        if self.trainer.world_size > 1:
            states = [mine] * self.trainer.world_size
            distributed.all_gather_object(states, mine)
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read them; checkpoints of earlier versions have none."""
        self._random_states = checkpoint.get("random_states")

    def on_train_start(self) -> None:
        """Go on with them; a new training, or one on another number of ranks, gives each rank numbers of its own."""
        states, self._random_states = self._random_states, None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if states is not None:
            self.random_seed = states[0]["seed"]
        if states is not None and len(states) == world:
            torch.set_rng_state(states[rank]["cpu"].cpu())
            if states[rank]["cuda"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(states[rank]["cuda"].cpu(), self.device)
        elif rank > 0:
            torch.manual_seed((self.random_seed + rank) % 2**63)
