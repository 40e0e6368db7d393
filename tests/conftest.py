"""Shared by all tests; having it here puts tests/ on the import path."""
