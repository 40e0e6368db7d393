"""The sums that every integer backend must give, in an arithmetic that holds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def accumulate(codes: Tensor, weight_codes: Tensor, module: Any) -> Tensor:
    """``sum codes * weight_codes`` of a linear operator, exactly: in float64, whose integers reach 2^53.

    Float32 holds whole numbers up to 2^24 only, and K = 4608 products of 8-bit codes go beyond.

    Args:
        codes: Codes of the input less their zero point, whole numbers of any dtype, in the input's shape.
        weight_codes: Likewise of the weight.
        module: The Linear or Conv: stride, padding, dilation, groups.

    Returns:
        float64, in the output's shape.

    >>> import torch
    >>> accumulate(torch.tensor([[1, 2]]), torch.tensor([[3, -1]]), nn.Linear(2, 1))
    tensor([[1.]], dtype=torch.float64)
    """
    x, weight = codes.double(), weight_codes.double()
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    output: Tensor = module._conv_forward(x, weight, None)
    return output
