"""Ranges of activations, from closed-loop trajectories."""
