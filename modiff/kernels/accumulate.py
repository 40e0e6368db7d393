"""The sums that every integer backend must give, in an arithmetic that holds them."""

from __future__ import annotations

from torch import Tensor

from modiff.kernels.backend import OperatorShape
from modiff.kernels.float import linear_map


def accumulate(codes: Tensor, weight_codes: Tensor, shape: OperatorShape) -> Tensor:
    """``sum codes * weight_codes`` of a linear operator, exactly: in float64, whose integers reach 2^53.

    Float32 holds whole numbers up to 2^24 only, and K = 4608 products of 8-bit codes go beyond.

    Args:
        codes: Codes of the input less their zero point, whole numbers of any dtype, in the input's shape.
        weight_codes: Codes of the weight less theirs.
        shape: Of the operator.

    Returns:
        float64, in the output's shape.

    >>> import torch
    >>> accumulate(torch.tensor([[1, 2]]), torch.tensor([[3, -1]]), OperatorShape("linear", 2, 1))
    tensor([[1.]], dtype=torch.float64)
    """
    return linear_map(codes.double(), weight_codes.double(), None, shape)
