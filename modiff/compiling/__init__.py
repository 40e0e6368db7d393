"""Graphs around operators."""
