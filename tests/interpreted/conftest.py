"""Tests of Triton's kernels in its interpreter, on tensors of the CPU.

``TRITON_INTERPRET=1`` must be set before Triton is imported, and other tests need it unset: these run in a process of
their own, started by ``tests/unit/test_triton.py``; by hand, ``TRITON_INTERPRET=1 python -m pytest tests/interpreted``.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
