"""Callbacks of the Lightning layer."""
