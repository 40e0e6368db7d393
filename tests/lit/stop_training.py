"""A callback for a test: Ctrl-C in the middle of a training."""

from lightning.pytorch import Callback


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt
