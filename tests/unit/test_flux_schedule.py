"""FLUX's noise levels."""

from __future__ import annotations

import math

import torch

from modiff.teachers.sampling.schedulers import make_scheduler


def test_levels_fall_evenly_from_one_and_end_at_zero() -> None:
    scheduler = make_scheduler("flow_euler_flux", shift=1.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([1000.0, 750.0, 500.0, 250.0]))


def test_dynamic_shift_grows_with_the_image() -> None:
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        scheduler = make_scheduler("flow_euler_flux", use_dynamic_shifting=True, image_seq_len=tokens)
        scheduler.set_timesteps(2)
        expected = math.exp(mu) / (math.exp(mu) + 1)  # of the level 1/2
        assert math.isclose(float(scheduler.sigmas[1]), expected, rel_tol=1e-6)
