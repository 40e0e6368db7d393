"""The same operation, executed differently: backends behind one protocol, defined by :mod:`modiff.kernels.float`."""

from modiff.kernels.accumulate import accumulate

__all__ = ["accumulate"]
