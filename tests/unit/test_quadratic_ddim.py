"""The quadratic time steps against the closed form of DDIM, and against the stock scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from sampler_noise import SHAPE, start_noise, step_noise

from modiff.errors import ConfigError
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.schedulers import QuadraticDDIMScheduler, make_scheduler


@pytest.fixture
def noise() -> torch.Tensor:
    return start_noise()


def uniform_alphas(scheduler: DDIMScheduler) -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, scheduler.config.num_train_timesteps))


class TestQuadratic:
    def test_time_steps_of_the_cifar10_protocol(self):
        scheduler = make_scheduler("ddim_quadratic")
        for steps in (10, 20, 50, 100):
            expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
            scheduler.set_timesteps(steps)
            assert scheduler.timesteps.tolist() == expected[::-1]
        assert scheduler.timesteps.tolist()[-6:] == [2, 1, 0, 0, 0, 0]  # 100 steps visit 0 four times

    @pytest.mark.parametrize("steps", [10, 100])
    @pytest.mark.parametrize("eta", [0.0, 0.7])
    def test_closed_form_of_the_whole_trajectory(self, steps, eta, noise):
        """Equation 12 of the DDIM paper in float64, from the list of the protocol, alpha = 1 before time step 0."""
        scheduler = make_scheduler("ddim_quadratic", clip_sample=False)
        alphas = uniform_alphas(scheduler)
        times = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]

        def epsilon(x, t):
            return torch.sin(3 * x) * 0.5 + x * 0.1 + 0.001 * float(t)

        x = noise.double().numpy()
        for i, (t, previous) in enumerate(zip(times[::-1], [*times[:-1][::-1], -1], strict=True)):
            a, a_prev = alphas[t], alphas[previous] if previous >= 0 else 1.0
            e = epsilon(torch.from_numpy(x), t).numpy()
            sigma = eta * np.sqrt((1 - a_prev) / (1 - a)) * np.sqrt(1 - a / a_prev)
            x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
            x = np.sqrt(a_prev) * x0 + np.sqrt(1 - a_prev - sigma**2) * e + sigma * step_noise(i).double().numpy()
        images = sample(epsilon, scheduler, noise.double(), steps, eta=eta, step_noise=step_noise)
        # The scheduler's alphas are float32.
        torch.testing.assert_close(images, torch.from_numpy(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
    @pytest.mark.parametrize("extra", [{}, {"clip_sample": False}, {"thresholding": True}])
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_on_an_even_list_it_is_the_stock_scheduler(self, noise, prediction, extra, eta):
        stock = DDIMScheduler(prediction_type=prediction, **extra)
        stock.set_timesteps(10)
        ours = QuadraticDDIMScheduler(prediction_type=prediction, **extra)
        ours.set_timesteps(10)
        ours._times = stock.timesteps.tolist()
        for i, t in enumerate(stock.timesteps):
            output = step_noise(i)
            for clipped in (False, True):
                ours._place = i
                kwargs = {"eta": eta, "variance_noise": step_noise(50 + i), "use_clipped_model_output": clipped}
                expected = stock.step(output, t, noise, **kwargs)
                result = ours.step(output, t, noise, **kwargs)
                torch.testing.assert_close(result.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(result.pred_original_sample, expected.pred_original_sample)

    def test_generator_gives_the_noise(self, noise):
        results = []
        for kwargs in ({"generator": torch.Generator().manual_seed(3)}, {"variance_noise": None}):
            scheduler = make_scheduler("ddim_quadratic")
            scheduler.set_timesteps(10)
            if "variance_noise" in kwargs:
                kwargs = {"variance_noise": torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))}
            results.append(scheduler.step(noise, 800, noise, eta=1.0, return_dict=False, **kwargs)[0])
        assert torch.equal(*results)

    def test_wrong_order_is_refused(self, noise):
        scheduler = make_scheduler("ddim_quadratic")
        with pytest.raises(ConfigError, match="has no time steps yet. Call scheduler.set_timesteps"):
            scheduler.step(noise, 800, noise)
        scheduler.set_timesteps(10)
        with pytest.raises(ConfigError, match="step was called for time step 3, but time step 800 is next"):
            scheduler.step(noise, 3, noise)
        scheduler.set_begin_index(9)
        scheduler.step(noise, 0, noise)
        with pytest.raises(ConfigError, match="all its steps are taken"):
            scheduler.step(noise, 0, noise)

    @pytest.mark.parametrize("steps", [1, 1001])
    def test_number_of_steps(self, steps):
        with pytest.raises(ConfigError, match=f"steps is {steps}; quadratic DDIM allows 2 to 1000"):
            make_scheduler("ddim_quadratic").set_timesteps(steps)

    def test_unknown_prediction_type(self, noise):
        scheduler = make_scheduler("ddim_quadratic", prediction_type="score")
        scheduler.set_timesteps(10)
        with pytest.raises(ConfigError, match="prediction_type is 'score'; quadratic DDIM allows 'epsilon'"):
            scheduler.step(noise, 800, noise)
