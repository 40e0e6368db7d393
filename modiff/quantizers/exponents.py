"""Scales that are powers of two times one scale per sample, inside the int8 container of the codes.

The channels of one residual differ by 10 to 100 times, and codes of b bits leave spare bits in a container of 8. So
each sample and channel gets the scale ``s[n] * 2**-e[n, c]`` with a whole exponent ``0 <= e <= E``: the product takes
``(code - zero point) * 2**(E - e)``, an int8, in units of ``s[n] * 2**-E``, which is the same for all that one output
sums over. Weights stay as they are, and sums stay exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exponents"]


def exponents(own: Tensor, shared: Tensor, most: int) -> Tensor:
    """``e = clamp(floor(log2(shared / own)), 0, most)``, by the floats' own exponents: no division, no logarithm.

    So every backend gets the same numbers, and ``own <= shared * 2**-e < 2 * own`` wherever ``e < most``: at most one
    bit is lost against scales of any value.

    Args:
        own: Scale of each sample and channel's own range, at least 0; 0 (a channel of zeros) gives ``most``.
        shared: The largest of each sample, broadcasting against ``own``.
        most: E of ``QuantSpec.spare_bits``.

    Returns:
        Whole numbers in the dtype of ``own``.

    >>> exponents(torch.tensor([8.0, 4.0, 3.9, 0.1, 0.0]), torch.tensor(8.0), most=4)
    tensor([0., 1., 1., 4., 4.])
    """
    mantissa, exponent = torch.frexp(own)
    shared_mantissa, shared_exponent = torch.frexp(shared)
    found = (shared_exponent - exponent - (shared_mantissa < mantissa).to(exponent.dtype)).clamp(0, most)
    return torch.where(own > 0, found.to(own.dtype), float(most))
