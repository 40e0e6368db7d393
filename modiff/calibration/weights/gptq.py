"""GPTQ: one pass over a weight's columns, each rounding error fed into the columns that are still to be rounded."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from modiff.calibration.loop.moments import Moments
from modiff.calibration.settings import CalibrationSettings
from modiff.calibration.weights.methods import WeightMethod, WeightProblem, register
from modiff.config.quant import QuantSpec
from modiff.errors import CalibrationError
from modiff.quantizers.affine import dequantize, quantize
from modiff.quantizers.rounding import QuantizedWeight

LOGGER = logging.getLogger(__name__)
BLOCK = 128
"""Columns after which the errors are applied to the rest of the weight; it moves no result but by rounding."""


@register("gptq")
class Gptq(WeightMethod):
    """Round a weight column by column; no targets are needed, so operators may share a run."""

    uses_data = True

    def operators_per_run(self, settings: CalibrationSettings) -> int:
        """As many as ``stage_size`` says."""
        return settings.stage_size

    def solve(self, problem: WeightProblem, moments: Moments, settings: CalibrationSettings) -> QuantizedWeight:
        """Quantize a weight from the moments of the operator's inputs."""
        grid = problem.nearest()
        return gptq(problem.weight, moments.hessian, grid, problem.spec, settings.damping, problem.name)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: QuantizedWeight,
    spec: QuantSpec,
    damping: float = 0.01,
    name: str = "",
    block: int = BLOCK,
) -> QuantizedWeight:
    """Round a weight so that the output, not the weight, changes little (Frantar et al. 2022, algorithm 1).

    Columns are taken in order of falling Hessian diagonal. A row for which that comes out worse than the codes of
    ``grid`` keeps these, so no row is worse than rounding to nearest in the norm of the damped Hessian.

    Args:
        weight: ``[out, in / groups, *kernel]``.
        hessian: ``sum x x^T`` over input vectors, ``[groups, K, K]``, any scale; see
            :class:`modiff.calibration.loop.moments.Moments`.
        grid: The weight rounded to nearest: its scales and zero points are kept.
        spec: The quantizer.
        damping: Share of the mean diagonal that is added to the diagonal. Where the Hessian is singular all the same,
            it is raised tenfold until it is not, and a log line says so.
        name: The operator, for messages.
        block: See :data:`BLOCK`.

    Raises:
        CalibrationError: The Hessian holds NaN or Inf, or is singular even with its mean diagonal added.
    """
    groups, size = hessian.shape[:2]
    flat = weight.detach().double().reshape(groups, -1, size)
    scale, zero_point = (
        None if t is None else t.double().expand(weight.shape).reshape(flat.shape)
        for t in (grid.scale, grid.zero_point)
    )
    assert scale is not None
    codes = grid.codes.double().reshape(flat.shape).clone()
    for g in range(groups):
        order = hessian[g].diagonal().argsort(descending=True, stable=True)
        damped, upper = _factor(hessian[g].double()[order][:, order], damping, name)
        w, s, z = (None if t is None else t[g][:, order] for t in (flat, scale, zero_point))
        assert w is not None
        assert s is not None
        new, old = _round_columns(w, upper, s, z, spec, block), codes[g][:, order]
        loss_new, loss_old = (((e := dequantize(c, s, z) - w) @ damped * e).sum(dim=1) for c in (new, old))
        codes[g][:, order] = torch.where((loss_new < loss_old)[:, None], new, old)
    return replace(grid, codes=codes.reshape(weight.shape).to(grid.codes.dtype))


def _round_columns(
    w: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, block: int
) -> Tensor:
    """Round columns to codes ``[out, K]``; ``upper`` is the Cholesky factor of the inverse Hessian, in their order."""
    w, codes = w.clone(), torch.empty_like(w)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for i in range(first, last):
            zero = None if zero_point is None else zero_point[:, i]
            codes[:, i] = quantize(w[:, i], scale[:, i], zero, spec)
            error = (w[:, i] - dequantize(codes[:, i], scale[:, i], zero)) / upper[i, i]
            w[:, i + 1 : last] -= error[:, None] * upper[i, i + 1 : last]
            errors[:, i - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return codes


def _factor(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """Damp the Hessian as far as needed; return it with the upper Cholesky factor of its inverse."""
    if not torch.isfinite(hessian).all():
        raise CalibrationError(f"The Hessian of operator {name!r} holds NaN or Inf. Check the data it was made from.")
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = hessian.diagonal().mean()
    if mean <= 0:  # every input was zero: no output depends on the weight, and rounding to nearest is as good as any
        return identity, identity
    share = damping
    while share <= 1:
        damped = hessian + share * mean * identity
        lower, failed = torch.linalg.cholesky_ex(damped)
        # A pivot at the level of rounding would pass as a huge inverse.
        floor = torch.finfo(hessian.dtype).eps * len(hessian) * mean
        if not failed and lower.diagonal().square().min() > floor:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                if share > damping:
                    message = "The Hessian of operator %r is singular with damping %g; %g was used."
                    LOGGER.warning(message, name, damping, share)
                return damped, upper
        share = max(share * 10, 1e-6)
    raise CalibrationError(
        f"The Hessian of operator {name!r} is singular even when its whole mean diagonal is added to it. Record more "
        "evaluations or positions, or keep the operator's weight in full precision by a rule."
    )
