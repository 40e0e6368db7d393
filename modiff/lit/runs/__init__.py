"""A run on disk and elsewhere: its directory, its batches, its launcher, Weights & Biases."""
