"""Tests of Triton's kernels in its interpreter, on tensors of the CPU.

``TRITON_INTERPRET=1`` must be set before Triton is imported, and other tests need it unset: these run in a process of
their own, started by ``tests/unit/test_triton.py``; by hand, ``TRITON_INTERPRET=1 python -m pytest tests/interpreted``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is missing where a file was named by hand, which no pattern above leaves out."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="set TRITON_INTERPRET=1 before pytest starts"))
