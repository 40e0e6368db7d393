"""Measurements of time and memory for ``modiff bench``."""
