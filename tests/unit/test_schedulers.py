"""Samplers: evaluations, resets, exactness; how they are made, and what they refuse."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import UNet2DModel
from sampler_noise import SHAPE, start_noise, step_noise
from small_models import tiny_unet

import modiff
from modiff.errors import ConfigError
from modiff.teachers.sampling.loop import sample, set_timesteps
from modiff.teachers.sampling.schedulers import SAMPLERS, QuadraticDDIMScheduler, make_scheduler

STOCHASTIC = {"ddpm", "euler_ancestral"}
# Evaluations of 5 steps. PNDM without skip_prk_steps starts with a Runge-Kutta phase of 12 evaluations for 3 steps, and
# PLMS visits its second time step twice; all others evaluate once per step.
EVALUATIONS = {name: 5 for name in SAMPLERS} | {"pndm": 14, "plms": 6}


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return tiny_unet()


@pytest.fixture
def noise() -> torch.Tensor:
    return start_noise()


def draw(denoiser, name: str, noise: torch.Tensor, steps: int = 5, **kwargs) -> torch.Tensor:
    return sample(denoiser, make_scheduler(name), noise, steps, step_noise=step_noise, **kwargs)


@pytest.mark.parametrize("name", SAMPLERS)
class TestEverySampler:
    def test_evaluations_are_counted_and_all_but_the_first_quantized(self, unet, noise, name):
        config = modiff.QuantConfig(activation=modiff.QuantSpec(8, "sample"), modulation=modiff.Modulation())
        seen = []
        student = modiff.quantize(unet, config)
        try:
            with modiff.trajectory(student) as run:
                draw(student, name, noise, on_evaluation=lambda i, t, x: seen.append((i, float(t), x.shape)))
        finally:
            modiff.restore(student)
        assert run.total == EVALUATIONS[name]
        assert run.quantized == EVALUATIONS[name] - 1
        assert [i for i, _, _ in seen] == list(range(run.total))
        assert {shape for _, _, shape in seen} == {noise.shape}
        assert [t for _, t, _ in seen] == [float(t) for t in set_timesteps(make_scheduler(name), 5)]

    def test_full_precision_student_equals_the_teacher_exactly(self, unet, noise, name):
        expected = draw(unet, name, noise)
        assert expected.isfinite().all()
        assert not torch.equal(expected, noise)
        student = modiff.quantize(unet, modiff.QuantConfig())
        try:
            with modiff.trajectory(student) as run:
                images = draw(student, name, noise)
        finally:
            modiff.restore(student)
        assert torch.equal(images, expected)
        assert run.quantized == 0

    def test_second_trajectory_does_not_see_the_first(self, unet, noise, name):
        scheduler = make_scheduler(name)
        other = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
        student = modiff.quantize(unet, modiff.QuantConfig.preset("w32a4-modiff-paper"))
        images = []
        try:
            for start in (noise, other, noise):
                with modiff.trajectory(student):
                    images.append(sample(student, scheduler, start, 5, step_noise=step_noise))
        finally:
            modiff.restore(student)
        assert torch.equal(images[0], images[2])
        assert not torch.equal(images[0], images[1])

    def test_is_a_pure_function(self, unet, noise, name):
        before, state = noise.clone(), torch.get_rng_state()
        scheduler = make_scheduler(name)
        timesteps = copy.deepcopy(scheduler.timesteps)  # None before PNDM's are set
        sample(unet, scheduler, noise, 5, step_noise=step_noise)
        assert (scheduler.timesteps is None) == (timesteps is None)
        assert timesteps is None or torch.equal(scheduler.timesteps, timesteps)
        assert torch.equal(noise, before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_same_images_as_the_plain_diffusers_loop(self, unet, noise, name):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(5)
        x, generator = noise * getattr(scheduler, "init_noise_sigma", 1.0), torch.Generator().manual_seed(7)
        drawn = []
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            state = generator.get_state()
            extra = {"generator": generator} if name in STOCHASTIC else {}
            with torch.no_grad():
                x = scheduler.step(unet(scaled, t).sample, t, x, **extra).prev_sample
            replay = torch.Generator()
            replay.set_state(state)
            drawn.append(torch.randn(SHAPE, generator=replay))
        assert torch.equal(sample(unet, make_scheduler(name), noise, 5, step_noise=drawn.__getitem__), x)


# Solvers that evaluate twice per step, singlestep orders, a step of noise, and a scheduler by its class path.
VARIANTS = {
    "Heun by class path": ("diffusers.HeunDiscreteScheduler", {}, {}, 9),
    "DDIM with eta": ("ddim", {}, {"eta": 0.7}, 5),
    "quadratic DDIM with eta": ("ddim_quadratic", {}, {"eta": 1.0}, 5),
    "third order, singlestep": ("diffusers.DPMSolverSinglestepScheduler", {"solver_order": 3}, {}, 5),
    "UniPC of third order": ("unipc", {"solver_order": 3}, {}, 5),
}


@pytest.mark.parametrize(("name", "arguments", "extra", "evaluations"), VARIANTS.values(), ids=VARIANTS)
def test_variants_of_samplers_are_counted_and_exact(unet, noise, name, arguments, extra, evaluations):
    def images_of(denoiser):
        return sample(denoiser, make_scheduler(name, None, **arguments), noise, 5, step_noise=step_noise, **extra)

    expected = images_of(unet)
    assert expected.isfinite().all()
    for config, quantized in ((modiff.QuantConfig(), 0), (modiff.QuantConfig.preset("w32a8-modiff"), evaluations - 1)):
        student = modiff.quantize(unet, config)
        try:
            found = []
            for _ in range(2):  # the second trajectory warms up again
                with modiff.trajectory(student) as run:
                    found.append(images_of(student))
                assert (run.total, run.quantized) == (evaluations, quantized)
        finally:
            modiff.restore(student)
        assert torch.equal(*found)
        assert torch.equal(found[0], expected) == (quantized == 0)


class TestMakeScheduler:
    def test_takes_the_noise_schedule_of_another_scheduler(self):
        teacher = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012, clip_sample=False)
        for config in (teacher, teacher.config, dict(teacher.config)):
            scheduler = make_scheduler("ddim_quadratic", config)
            assert isinstance(scheduler, QuadraticDDIMScheduler)
            assert torch.equal(scheduler.alphas_cumprod, teacher.alphas_cumprod)
            assert scheduler.config.clip_sample is False

    def test_names(self):
        assert make_scheduler("ddim").config.timestep_spacing == "leading"
        trailing = make_scheduler("ddim_trailing", diffusers.DDIMScheduler())
        trailing.set_timesteps(10)
        assert trailing.timesteps.tolist() == list(range(999, 0, -100))
        assert make_scheduler("plms").config.skip_prk_steps is True
        assert make_scheduler("dpmpp_3s").config.solver_order == 3
        assert make_scheduler("dpm_solver_2").config.algorithm_type == "dpmsolver"

    def test_overrides_win(self):
        teacher = diffusers.DDIMScheduler(num_train_timesteps=100)
        scheduler = make_scheduler("ddim", teacher, timestep_spacing="trailing", num_train_timesteps=40)
        assert scheduler.config.timestep_spacing == "trailing"
        assert len(scheduler.alphas_cumprod) == 40
        assert teacher.config.num_train_timesteps == 100

    def test_class_path(self, unet, noise):
        scheduler = make_scheduler("diffusers.HeunDiscreteScheduler", {"num_train_timesteps": 50})
        seen = []
        images = sample(unet, scheduler, noise, 4, on_evaluation=lambda i, t, x: seen.append(i))
        assert len(seen) == 7  # two evaluations per step but for the last
        assert images.isfinite().all()

    def test_class_of_the_users_own(self, noise):
        scheduler = make_scheduler(f"{__name__}.Halving", {"factor": 0.5})
        assert torch.equal(sample(lambda x, t: (x,), scheduler, noise, 3), noise * 0.125)

    @pytest.mark.parametrize("name", ["dddim", "ddim-trailing", None])
    def test_unknown_name(self, name):
        with pytest.raises(
            ConfigError, match="unknown sampler .*; allowed are ddim, ddim_trailing, .* or a class path"
        ):
            make_scheduler(name)

    @pytest.mark.parametrize("path", ["nowhere.Scheduler", "diffusers.NoSuchScheduler"])
    def test_path_that_cannot_be_imported(self, path):
        with pytest.raises(ConfigError, match=f"sampler '{path}' cannot be imported"):
            make_scheduler(path)

    def test_path_of_something_else(self):
        with pytest.raises(ConfigError, match="'torch.nn.Linear' is no scheduler: it needs set_timesteps"):
            make_scheduler("torch.nn.Linear")

    def test_unknown_argument(self):
        with pytest.raises(ConfigError, match="DDIMScheduler has no argument 'beta_strat'; allowed are beta_end"):
            make_scheduler("ddim", {"beta_strat": 0.1})
        with pytest.raises(ConfigError, match="DDIMScheduler has no argument 'clip'"):
            make_scheduler("ddim", diffusers.DDIMScheduler(), clip=True)

    def test_unknown_value(self):
        with pytest.raises(ConfigError, match="DDIMScheduler refuses its arguments: cubic"):
            make_scheduler("ddim", {"beta_schedule": "cubic"})

    def test_config_of_another_kind(self):
        with pytest.raises(ConfigError, match="scheduler config is 3; give a diffusers scheduler"):
            make_scheduler("ddim", 3)

    def test_noise_process_of_another_kind(self):
        with pytest.raises(ConfigError, match="DDIMScheduler is of diffusion, but FlowMatchEuler.* Use a sampler that"):
            make_scheduler("flow_euler", diffusers.DDIMScheduler())
        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(
            ConfigError, match="is of flow matching, but DDIMScheduler is of diffusion. Use 'flow_euler'"
        ):
            make_scheduler("ddim", flow)
        solver = make_scheduler("unipc", flow, use_flow_sigmas=True, prediction_type="flow_prediction")
        assert solver.config.use_flow_sigmas is True
        assert make_scheduler("flow_euler", flow, shift=3.0).config.shift == 3.0


class Halving:
    """A scheduler with the two methods that are needed, and nothing else."""

    def __init__(self, factor: float = 0.1) -> None:
        self.factor = factor

    def set_timesteps(self, steps, device=None):
        self.timesteps = torch.arange(steps, 0, -1, device=device)

    def step(self, output, t, x):
        return (output * self.factor,)


class TestSample:
    def test_noise_of_a_sample_does_not_depend_on_its_batch(self, unet, noise):
        for name, eta in (("ddim_quadratic", 1.0), ("ddim", 0.5), ("ddpm", 0.0)):
            both = sample(unet, make_scheduler(name), noise, 5, eta=eta, step_noise=step_noise)
            second = sample(unet, make_scheduler(name), noise[1:], 5, eta=eta, step_noise=lambda i: step_noise(i)[1:])
            torch.testing.assert_close(both[1:], second, rtol=1e-4, atol=1e-5)  # another batch size: float rounding

    def test_eta_adds_noise(self, unet, noise):
        assert not torch.equal(draw(unet, "ddim", noise, eta=1.0), draw(unet, "ddim", noise))

    @pytest.mark.parametrize("name", ["diffusers.EulerAncestralDiscreteScheduler", "diffusers.LCMScheduler"])
    def test_noise_of_samplers_that_take_a_generator_only(self, unet, noise, name):
        asked = []

        def supply(i):
            asked.append(i)
            return step_noise(i)

        extra = {"original_inference_steps": 20} if "LCM" in name else {}
        scheduler = make_scheduler(name, {"num_train_timesteps": 100}, **extra)
        first = sample(unet, scheduler, noise, 4, step_noise=supply)
        assert set(asked) >= {0, 1, 2}
        assert torch.equal(first, sample(unet, scheduler, noise, 4, step_noise=step_noise))
        assert not torch.equal(first, sample(unet, scheduler, noise, 4, step_noise=lambda i: step_noise(i + 1)))

    def test_noise_is_missing(self, unet, noise):
        with pytest.raises(ConfigError, match="DDPMScheduler adds noise in its steps, but step_noise is None"):
            sample(unet, make_scheduler("ddpm"), noise, 5)

    def test_noise_of_another_shape(self, unet, noise):
        with pytest.raises(
            ConfigError, match=r"step_noise\(0\) has shape \[1, 1, 8, 8\], but the images have \[2, 1, 8"
        ):
            sample(unet, make_scheduler("ddpm"), noise, 5, step_noise=lambda i: step_noise(i)[:1])

    def test_noise_drawn_in_another_way(self, noise):
        class Uniform(Halving):
            def step(self, output, t, x):
                return (output + torch.rand_like(x),)

        class Twice(Halving):
            def step(self, output, t, x):
                return (output + torch.randn_like(x) * torch.randn(x.shape),)

        with pytest.raises(ConfigError, match=r"Uniform draws random numbers .* \(rand_like\)"):
            sample(lambda x, t: x, Uniform(), noise, 2, step_noise=step_noise)
        with pytest.raises(ConfigError, match="Twice draws noise twice in one step"):
            sample(lambda x, t: x, Twice(), noise, 2, step_noise=step_noise)

    def test_eta_where_there_is_none(self, unet, noise):
        with pytest.raises(ConfigError, match="eta is 0.5, but EulerDiscreteScheduler has no eta. Set eta to 0"):
            sample(unet, make_scheduler("euler"), noise, 5, eta=0.5)
        with pytest.raises(ConfigError, match="eta is 1.5; allowed is 0"):
            sample(unet, make_scheduler("ddim"), noise, 5, eta=1.5)

    @pytest.mark.parametrize("name", [n for n in SAMPLERS if not n.startswith("flow_")])
    def test_more_steps_than_the_noise_schedule_has(self, unet, noise, name):
        scheduler = make_scheduler(name, num_train_timesteps=10)
        with pytest.raises(ConfigError, match="steps is 11, but .* has 10 time steps. Set steps to at most 10"):
            sample(unet, scheduler, noise, 11)

    @pytest.mark.parametrize("steps", [0, -1, 2.5, True, None])
    def test_steps_of_another_kind(self, unet, noise, steps):
        with pytest.raises(ConfigError, match="steps is .*; give a whole number of at least 1"):
            sample(unet, make_scheduler("ddim"), noise, steps)

    def test_time_steps_outside_the_noise_schedule(self, unet, noise):
        # 900 steps of 1 from offset 200 end beyond the last of 1000.
        with pytest.raises(
            ConfigError, match="asks for time steps from 1099 to 200, and the noise schedule has 0 to 999"
        ):
            sample(unet, make_scheduler("ddim", steps_offset=200), noise, 900)

    def test_steps_that_the_scheduler_refuses(self, unet, noise):
        flow = make_scheduler("flow_euler", use_dynamic_shifting=True)
        with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler cannot set 5 steps: .*mu"):
            sample(unet, flow, noise, 5)

    def test_denoiser_that_predicts_a_variance_too(self, noise):
        with pytest.raises(ConfigError, match=r"The denoiser returned \[2, 2, 8, 8\] for an input \[2, 1, 8, 8\]"):
            sample(lambda x, t: torch.cat([x, x], dim=1), make_scheduler("ddim"), noise, 5)
