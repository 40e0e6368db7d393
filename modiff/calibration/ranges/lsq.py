"""Learned step sizes of activations, operator by operator (LSQ, Esser et al. 2020; as in Q-Diffusion with MoDiff)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modiff.calibration.loop.samples import SampleStore
from modiff.calibration.settings import CalibrationSettings
from modiff.config.quant import QuantSpec
from modiff.operators.dtypes import compute_input
from modiff.operators.quantized import QuantizedOperator
from modiff.quantizers.calibrated import CalibratedRange
from modiff.quantizers.granularity import Partition


def learn_steps(
    operator: QuantizedOperator,
    spec: QuantSpec,
    start: CalibratedRange,
    store: SampleStore,
    settings: CalibrationSettings,
    generator: torch.Generator,
) -> CalibratedRange:
    """Learn scales and zero points that lose least in an operator's output: ``sum ||A(Q(x)) - A(x)||^2``.

    ``A`` is the operator with its quantized weight; for residuals, what is lost is the change of its output, since
    ``a - â = x - Q(x)`` (equation 18). Scale and zero point come from the same two ends of a range, so that neither is
    ever left behind (trap 6).

    Args:
        operator: Of the student.
        spec: Its quantizer.
        start: Where learning begins; it is returned where learning made the ranges no better.
        store: Rows ``x`` (inputs, or residuals) and ``bucket`` (int64).
        settings: Steps, learning rate, batch size.
        generator: Draws batches, on the CPU.
    """
    # Learned are logarithms of factors: a step then means the same for wide and for narrow ranges.
    factors = torch.zeros(2, start.buckets, start.sets, device=start.scale.device).requires_grad_(True)
    optimizer = torch.optim.Adam([factors], lr=settings.lsq_learning_rate)
    best, best_loss = start, _loss(operator, spec, start, store, settings)
    with torch.enable_grad():
        for step in range(settings.lsq_iterations):
            for group in optimizer.param_groups:
                group["lr"] = settings.lsq_learning_rate * (1 - step / settings.lsq_iterations)
            rows = store.rows(torch.randint(len(store), (settings.batch_size,), generator=generator))
            scale, zero_point = quantizer_of(factors, start, spec)
            loss = _output_error(operator, spec, scale, zero_point, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        scale, zero_point = quantizer_of(factors, start, spec)
        zero_point = None if zero_point is None else zero_point.round()
        found = CalibratedRange(scale.detach(), None if zero_point is None else zero_point.detach(), start.length)
    return found if _loss(operator, spec, found, store, settings) < best_loss else best


def quantizer_of(factors: Tensor, start: CalibratedRange, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Compute scale and zero point ``[buckets, sets]`` of the starting range with its ends times ``exp(factors)``.

    Args:
        factors: ``[2, buckets, sets]``: of the lower and of the upper end; symmetric quantizers use the upper one.
        start: The starting range.
        spec: The quantizer.

    Returns:
        The zero point is not rounded yet (:func:`round_through` does it in the forward); None where symmetric.
    """
    if start.zero_point is None:
        return start.scale * factors[1].exp(), None
    top = spec.code_range[1]
    low = -start.zero_point * start.scale * factors[0].exp()
    high = (top - start.zero_point) * start.scale * factors[1].exp()
    scale = (high - low) / top
    return scale, (-low / scale).clamp(0, top)


def learned_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Compute ``Q(x)`` with a gradient for scale and zero point, by the straight-through estimator.

    With respect to the scale it is ``round(x/s) - x/s`` inside the range, and the last code beyond it (Esser et al.
    2020, equation 3).

    >>> s = torch.tensor(0.5, requires_grad=True)
    >>> y = learned_quantize(torch.tensor([0.6, 9.0]), s, None, QuantSpec(4))
    >>> y.detach(), torch.autograd.grad(y[0], s, retain_graph=True)[0], torch.autograd.grad(y[1], s)[0]
    (tensor([0.5000, 3.5000]), tensor(-0.2000), tensor(7.))
    """
    codes = round_through(x / scale)
    if zero_point is None:
        return codes.clamp(*spec.code_range) * scale
    zero_point = round_through(zero_point)
    return ((codes + zero_point).clamp(*spec.code_range) - zero_point) * scale


def round_through(x: Tensor) -> Tensor:
    """Round to nearest, and let the gradient pass as if nothing were rounded."""
    return x + (x.round() - x).detach()


def _output_error(
    operator: QuantizedOperator, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None, rows: dict[str, Tensor]
) -> Tensor:
    """Compute the mean of ``||A(Q(x) - x)||^2`` over rows."""
    device = scale.device
    x, buckets = compute_input(rows["x"].to(device)), rows["bucket"].to(device)
    partition = operator.partition(x.ndim)
    scale = _by_row(scale, buckets, partition, x)
    zero_point = None if zero_point is None else _by_row(zero_point, buckets, partition, x)
    error = learned_quantize(x, scale, zero_point, spec) - x
    return operator.product(error, with_bias=False).square().sum() / len(x)


def _by_row(table: Tensor, buckets: Tensor, partition: Partition, x: Tensor) -> Tensor:
    """Pick the entries of ``[buckets, sets]`` for each row; they broadcast against ``x``."""
    shape: Any = partition.range_shape(x.shape)
    return partition.expand(table[buckets].reshape(len(x), *shape[1:]), x.shape)


@torch.no_grad()
def _loss(
    operator: QuantizedOperator,
    spec: QuantSpec,
    found: CalibratedRange,
    store: SampleStore,
    settings: CalibrationSettings,
) -> float:
    """Compute the error over all rows."""
    total = 0.0
    for places in torch.arange(len(store)).split(settings.batch_size):
        rows = store.rows(places)
        total += float(_output_error(operator, spec, found.scale, found.zero_point, rows)) * len(places)
    return total
