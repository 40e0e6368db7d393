"""Quantized operators and their state."""
