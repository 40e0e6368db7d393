"""The same operation, executed differently; ``simulate`` is the definition."""

from modiff.kernels.accumulate import accumulate

__all__ = ["accumulate"]
