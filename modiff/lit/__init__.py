"""The Lightning layer: the only place that knows lightning, wandb, jsonargparse and matplotlib."""
