"""A run and the settings with which small students are calibrated."""

from small_models import noise

import modiff
from modiff.calibration import CalibrationSettings

FAST = CalibrationSettings(
    iterations=30, evaluations=3, positions=400, samples=16, batch_size=8, stage_size=2, tuning_iterations=2
)


def sampler(evaluations=4, batch=2, seed=0, trajectories=1):
    """A run of trajectories, each from inputs of its own."""

    def run(student):
        for i in range(trajectories):
            with modiff.trajectory(student):
                for args in noise(evaluations, batch, seed + 10 * i):
                    student(*args)

    return run


def config(name="w3a4-modiff-paper", *rules):
    base = modiff.QuantConfig.preset(name)
    return modiff.QuantConfig(base.weight, base.activation, base.modulation, rules)
