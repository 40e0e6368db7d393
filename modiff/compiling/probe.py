"""Whether ``torch.compile`` can work here: what it lacks, and what a trial says."""

from __future__ import annotations

import torch


def missing_compiler(device: torch.device) -> str | None:
    """What is not installed that ``torch.compile`` needs on a device; None where nothing is missing. Tries nothing."""
    if device.type != "cpu":
        return None
    from torch._inductor import cpp_builder, exc  # importing it takes a second

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler is installed"
    return None


def compiler_problem(device: torch.device) -> str | None:
    """Why ``torch.compile`` does not work on a device, in a line; None where it does. Tried on a small function."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.zeros(8, device=device))
    except Exception as error:  # compilers fail in their own ways: none found, broken, no headers
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None
