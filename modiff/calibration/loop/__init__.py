"""Closed-loop runs of a student, and what is recorded of them."""
