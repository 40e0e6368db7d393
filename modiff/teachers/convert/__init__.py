"""Original checkpoints as diffusers modules."""
