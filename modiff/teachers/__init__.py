"""Pretrained full-precision denoisers: where they come from and how they are sampled."""
