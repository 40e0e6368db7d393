"""Students whose ranges are calibrated on small closed loops."""

import functools

import closed_loops
import torch
from small_models import denoiser, noise

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.calibration import CalibrationSettings, calibrate
from modiff.operators.modulated import ModulatedOperator
from modiff.student.swap import operators

EVALUATIONS = 6
FAST = CalibrationSettings(lsq_iterations=20, samples=64, batch_size=8, bins=256, stage_size=2)
sampler = functools.partial(closed_loops.sampler, EVALUATIONS)


def config(bits=4, granularity="tensor", symmetric=False, buckets=1, modulation=Modulation(), rules=()):  # noqa: B008
    group = 4 if granularity == "group" else None
    spec = QuantSpec(bits, granularity, symmetric, "calibrated", group_size=group, timestep_buckets=buckets)
    return QuantConfig(QuantSpec(8, "channel"), spec, modulation, rules)


def found_ranges(student):
    return {name: operator.calibrated for name, operator in operators(student).items()}


def calibrated(settings=FAST, run=None, model=None, seed=0, folder=None, progress=None, **fields):
    return calibrate(
        denoiser() if model is None else model,
        config(**fields),
        run or sampler(),
        "nearest",
        seed,
        settings=settings,
        folder=folder,
        progress=progress,
    )


def same(a, b):
    assert a.keys() == b.keys()
    for name, each in a.items():
        assert torch.equal(each.scale, b[name].scale)
        assert each.zero_point is None or torch.equal(each.zero_point, b[name].zero_point)
        assert each.length == b[name].length


def residuals(student, run):
    """What each operator quantizes in each evaluation, by a way of its own: a - â just before the call."""
    seen = {name: {} for name in operators(student)}

    def hook(operator, args):
        here = operator.state.trajectory.current
        modulated = isinstance(operator, ModulatedOperator)
        if not modulated or here.total:
            a_hat = here.caches[operator.name][0].a_hat if modulated else 0
            seen[operator.name].setdefault(here.total, []).append((args[0] - a_hat).clone())

    handles = [operator.register_forward_pre_hook(hook) for operator in operators(student).values()]
    run(student)
    for handle in handles:
        handle.remove()
    return seen


def run_split(student):
    with modiff.trajectory(student):
        for _, t in noise(EVALUATIONS):
            student(t)
