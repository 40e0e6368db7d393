"""quantize_pipeline on tiny random pipelines of diffusers' classes: every call is one trajectory."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import modiff
from modiff import QuantConfig, Rule
from modiff.errors import ConfigError, TrajectoryError

pytest.importorskip("diffusers")
import pipelines  # noqa: E402
from pipelines import BUILDERS, EVALUATIONS, build, draw  # noqa: E402


def student(pipe):
    return next(getattr(pipe, name) for name in ("unet", "transformer") if hasattr(pipe, name))


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_pipeline_samples_twice_and_is_restored(builder):
    pipe, arguments = build(builder)
    teacher, cls = draw(pipe, arguments), type(pipe)
    assert teacher.isfinite().all()
    assert teacher.std() > 0.01
    assert modiff.quantize_pipeline(pipe, QuantConfig()) is pipe
    assert torch.equal(draw(pipe, arguments), teacher)
    modiff.restore_pipeline(pipe)

    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)
    assert torch.equal(draw(pipe, arguments), images)
    assert not torch.equal(draw(pipe, arguments, seed=1), images)
    assert 0 < (images - teacher).norm() < 0.3 * teacher.norm()
    evaluations = EVALUATIONS.get(builder.__name__, 4)
    counts = list(pipe.trajectories.values())
    assert [(c.total, c.quantized) for c in counts] == [(evaluations, evaluations - 1)]
    assert isinstance(pipe, cls)
    assert type(pipe).__name__ == cls.__name__

    assert modiff.restore_pipeline(pipe) is pipe
    assert type(pipe) is cls
    assert torch.equal(draw(pipe, arguments), teacher)
    assert set(vars(pipe)) == set(vars(build(builder)[0])) | set(vars(pipe)) - {"trajectories", "_modiff_contexts"}


PROMPTED = [pipelines.stable_diffusion, pipelines.stable_diffusion_xl, pipelines.pixart_sigma, pipelines.sana]


@pytest.mark.parametrize("builder", PROMPTED)
@pytest.mark.parametrize("refresh_every", [None, 2])
def test_keys_and_values_of_the_prompt_are_computed_once(builder, refresh_every):
    pipe, arguments = build(builder)
    config = QuantConfig.preset("w8a4-modiff-paper")
    config = QuantConfig(config.weight, config.activation, modiff.Modulation(refresh_every=refresh_every))
    modiff.quantize_pipeline(pipe, config)
    images = draw(pipe, arguments)
    denoiser = student(pipe)
    fixed = {row.name for row in modiff.describe(denoiser) if row.constant}
    prompt = {n for n, m in denoiser.named_modules() if n.endswith((".attn2.to_k", ".attn2.to_v"))}
    assert fixed == prompt | ({"caption_projection.linear_1"} if hasattr(denoiser, "caption_projection") else set())
    assert len(prompt) >= 4
    # The same with a new tensor in each evaluation: nothing is fixed, the images are the same.
    denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": kwargs["encoder_hidden_states"].clone()}),
        with_kwargs=True,
    )
    assert torch.equal(draw(pipe, arguments), images)
    assert not any(row.constant for row in modiff.describe(denoiser))


@pytest.mark.parametrize("modulation", [{"state_dtype": "float16"}, {"warmup": "refine"}])
def test_a_projection_whose_output_still_changes_is_not_kept(modulation):
    pipe, arguments = build(pipelines.pixart_sigma)
    config = QuantConfig.preset("w8a4-modiff-paper")
    modiff.quantize_pipeline(pipe, QuantConfig(config.weight, config.activation, modiff.Modulation(**modulation)))
    images = draw(pipe, arguments)
    assert not any(row.constant and "attn2" in row.name for row in modiff.describe(pipe.transformer))
    assert torch.equal(draw(pipe, arguments), images)


def test_a_projection_that_is_no_function_of_its_input_is_reported():
    pipe, arguments = build(pipelines.pixart_sigma)
    modiff.quantize_pipeline(pipe, "w8a4-modiff-paper")
    pipe.transformer.caption_projection.act_1.register_forward_hook(lambda _, __, output: output + torch.rand(1))
    with pytest.raises(TrajectoryError, match="'caption_projection' was overwritten between evaluations"):
        draw(pipe, arguments)


def test_batches_may_differ_from_call_to_call():
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    first = draw(pipe, arguments)
    assert len(draw(pipe, {"batch_size": 3})) == 3
    assert torch.equal(draw(pipe, arguments), first)


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_call_that_raises_leaves_no_state(error):
    pipe, arguments = build(pipelines.stable_diffusion)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)

    def fail(pipe, step, t, values):
        assert pipe.unet.conv_in.state.trajectory is not None
        if step == 1:
            raise error
        return values

    scheduler = type(pipe.scheduler)
    with pytest.raises(error):
        draw(pipe, arguments, callback_on_step_end=fail)
    assert pipe.unet.conv_in.state.trajectory is None
    assert type(pipe.scheduler) is scheduler
    assert pipe.trajectories["unet"].total == 2
    assert pipe.trajectories["unet"].state_bytes == 0
    assert torch.equal(draw(pipe, arguments), images)


def test_an_interrupted_call_leaves_no_state():
    pipe, arguments = build(pipelines.stable_diffusion)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)

    def interrupt(pipe, step, t, values):
        pipe._interrupt = step >= 1
        return values

    draw(pipe, arguments, callback_on_step_end=interrupt)
    assert pipe.trajectories["unet"].total == 2
    assert torch.equal(draw(pipe, arguments), images)


def without_guidance(after):
    """diffusers' own recipe for switching guidance off in a callback."""

    def callback(pipe, step, t, values):
        if step == after:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


def test_guidance_in_one_batch_may_switch_off():
    pipe, arguments = build(pipelines.stable_diffusion)
    teacher = draw(pipe, arguments, steps=6, **without_guidance(2))
    guided = draw(pipe, arguments, steps=6)
    modiff.quantize_pipeline(pipe, QuantConfig())
    assert torch.equal(draw(pipe, arguments, steps=6, **without_guidance(2)), teacher)
    modiff.restore_pipeline(pipe)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments, steps=6, **without_guidance(2))
    assert (images - teacher).norm() < 0.2 * (guided - teacher).norm()
    assert (pipe.trajectories["unet"].total, pipe.trajectories["unet"].quantized) == (7, 6)


def test_guidance_in_two_calls_is_found_by_cache_context():
    pipe, arguments = build(pipelines.flux, guidance=3.0)
    teacher = draw(pipe, arguments)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)
    counts = pipe.trajectories["transformer"]
    assert (counts.total, counts.quantized) == (8, 6)
    assert {c.name: (c.total, c.quantized) for c in counts.contexts.values()} == {"cond": (4, 3), "uncond": (4, 3)}
    assert (images - teacher).norm() < 0.05 * teacher.norm()
    assert "cache_context" not in vars(pipe.transformer)


class OwnPipeline:
    """Guidance in two calls, up to a step, by any denoiser; no diffusers in it."""

    def __init__(self, unet, scheduler, calls=2, name="unet"):
        self.name = name
        self.parts = {name: unet, "scheduler": scheduler, "tokenizer": None}
        self.calls = calls

    @property
    def components(self):
        return dict(self.parts)

    def __call__(self, guide_until=9):
        """Draw."""
        scheduler = copy.deepcopy(self.parts["scheduler"])  # pipelines do
        scheduler.set_timesteps(4)
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for i, t in enumerate(scheduler.timesteps):
            calls = self.calls if i < guide_until else 1
            outputs = [self.parts[self.name](x * (1 + 0.1 * j), t).sample for j in range(calls)]
            x = scheduler.step(sum(outputs) / calls, t, x).prev_sample
        return x


def own(**options):
    pipe, _ = build(pipelines.ddim)
    return OwnPipeline(pipe.unet, pipe.scheduler, **options)


def test_two_calls_in_one_step_without_names_are_refused():
    pipe = modiff.quantize_pipeline(own(), "w8a8-modiff")
    with pytest.raises(
        TrajectoryError, match=r"was called twice in one step, and both .* contexts=\('uncond', 'cond'\)\)"
    ):
        pipe()
    assert pipe.parts["unet"].conv_in.state.trajectory is None


def test_two_calls_in_one_step_with_names():
    teacher = own()()
    pipe = modiff.quantize_pipeline(own(), "w8a8-modiff", contexts=("cond", "uncond"))
    images = pipe()
    counts = pipe.trajectories["unet"]
    assert {c.name: (c.total, c.quantized) for c in counts.contexts.values()} == {"cond": (4, 3), "uncond": (4, 3)}
    assert torch.equal(pipe(), images)
    assert (images - teacher).norm() < 0.1 * teacher.norm()


def test_two_calls_that_shall_share_one_state():
    pipe = modiff.quantize_pipeline(own(), "w8a8-modiff", contexts=("all",))
    pipe()
    assert (pipe.trajectories["unet"].total, pipe.trajectories["unet"].quantized) == (8, 7)


@pytest.mark.parametrize(("calls", "guide_until"), [(2, 2), (3, 9)])
def test_a_step_with_other_calls_than_were_named_is_refused(calls, guide_until):
    pipe = modiff.quantize_pipeline(own(calls=calls), "w8a8-modiff", contexts=("uncond", "cond"))
    with pytest.raises(TrajectoryError, match=r"different numbers of denoiser calls, and contexts names 2: uncond, co"):
        pipe(guide_until)
    assert type(pipe.parts["scheduler"]).__name__ == "DDIMScheduler"
    assert type(pipe.parts["scheduler"]).__module__.startswith("diffusers.")


def test_a_pipeline_of_ones_own_is_restored():
    teacher, pipe = own(calls=1)(), own(calls=1)
    modiff.quantize_pipeline(pipe, QuantConfig())
    assert torch.equal(pipe(), teacher)
    assert type(pipe) is not OwnPipeline
    assert type(modiff.restore_pipeline(pipe)) is OwnPipeline
    assert torch.equal(pipe(), teacher)


def test_several_denoisers_have_a_trajectory_each():
    pipe = own(calls=1)
    pipe.parts["unet_2"] = build(pipelines.ddim, seed=1)[0].unet
    pipe.parts["unet_again"] = pipe.parts["unet"]
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    assert len(modiff.describe(pipe.parts["unet_2"])) > 10
    pipe()
    assert {n: r.total for n, r in pipe.trajectories.items()} == {"unet": 4, "unet_2": 0}
    modiff.restore_pipeline(pipe)
    assert not hasattr(pipe.parts["unet_2"], "_modiff_state")


def test_denoisers_of_other_names_are_given():
    pipe = own(calls=1, name="prior")
    with pytest.raises(ConfigError, match=r"OwnPipeline has no denoiser: no module named .*are: prior\. Name those"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    with pytest.raises(ConfigError, match="OwnPipeline has no module 'decoder'. Its modules are: prior"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff", denoisers=("prior", "decoder"))
    modiff.quantize_pipeline(pipe, "w8a8-modiff", denoisers="prior")()
    assert pipe.trajectories["prior"].total == 4


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), 3, None])
def test_what_is_no_pipeline_is_refused(thing):
    with pytest.raises(ConfigError, match=r"is no pipeline .* use modiff.quantize\(model, config\)"):
        modiff.quantize_pipeline(thing, "w8a8-modiff")


def test_an_error_leaves_all_denoisers_as_they_were():
    pipe = own()
    pipe.parts["unet_2"] = nn.Sequential(nn.SiLU())
    with pytest.raises(ConfigError, match="no linear operators"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    assert type(pipe) is OwnPipeline
    assert not hasattr(pipe.parts["unet"], "_modiff_state")
    del pipe.parts["unet_2"]
    with pytest.raises(ConfigError, match="unknown preset 'w9a9'"):
        modiff.quantize_pipeline(pipe, "w9a9")
    with pytest.raises(ConfigError, match="contexts is 'cond'; give the names"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff", contexts="cond")
    with pytest.raises(ConfigError, match="The OwnPipeline is not quantized. Call modiff.quantize_pipeline"):
        modiff.restore_pipeline(pipe)


@pytest.mark.parametrize("keep_teacher", [True, False])
def test_all_denoisers_are_quantized_or_none(keep_teacher):
    teacher, pipe = own(calls=1)(), own(calls=1)
    pipe.parts["unet_2"] = nn.Sequential(nn.SiLU())
    with pytest.raises(ConfigError, match="no linear operators"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff", keep_teacher=keep_teacher)
    assert torch.equal(pipe(), teacher)


def test_the_original_weights_may_be_dropped():
    kept = modiff.quantize_pipeline(own(calls=1), "w8a8-modiff")
    pipe = modiff.quantize_pipeline(own(calls=1), "w8a8-modiff", keep_teacher=False)
    assert pipe.parts["unet"].conv_in.dropped
    assert torch.equal(pipe(), kept())
    with pytest.raises(ConfigError, match="was made with keep_teacher=False"):
        modiff.restore_pipeline(pipe)
    assert torch.equal(pipe(), kept())


def test_quantizing_twice_is_refused_and_the_first_stays():
    pipe = modiff.quantize_pipeline(own(calls=1), "w8a8-modiff")
    images = pipe()
    with pytest.raises(ConfigError, match="is a student already"):
        modiff.quantize_pipeline(pipe, "w8a4-modiff-paper")
    assert torch.equal(pipe(), images)


def test_denoisers_that_are_students_already_are_only_wrapped(tmp_path):
    pipe = modiff.quantize_pipeline(own(calls=1), "w4a4-modiff-paper")
    images = pipe()
    modiff.save(pipe.parts["unet"], tmp_path / "student")
    other = own(calls=1)
    with pytest.raises(ConfigError, match="config is None, but 'unet' is no student. Give a config"):
        modiff.quantize_pipeline(other)
    modiff.load(tmp_path / "student", other.parts["unet"])
    with pytest.raises(TrajectoryError, match="outside a trajectory"):
        other()
    assert torch.equal(modiff.quantize_pipeline(other)(), images)


def test_copies_and_pickles_of_a_pipeline_draw_the_same():
    pipe, arguments = build(pipelines.ddim)
    cls = type(pipe)
    modiff.quantize_pipeline(pipe, "w8a4-modiff-paper")
    images = draw(pipe, arguments)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(other, cls)
        assert other.unet is not pipe.unet
        assert torch.equal(draw(other, arguments), images)
        modiff.restore_pipeline(other)
    assert torch.equal(draw(pipe, arguments), images)


def test_a_pipeline_made_of_its_components_works():
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a4-modiff-paper")
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, arguments), draw(pipe, arguments))


def test_the_call_keeps_its_signature_and_help():
    pipe, _ = build(pipelines.ddim)
    before = inspect.signature(pipe.__call__), type(pipe).__call__.__doc__, repr(pipe)
    modiff.quantize_pipeline(pipe, "w8a8-ptq")
    assert (inspect.signature(pipe.__call__), type(pipe).__call__.__doc__, repr(pipe)) == before


def test_a_cast_between_calls_works():
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    assert draw(pipe.to(torch.float64), arguments).shape == (2, 8, 8, 3)
    assert pipe.trajectories["unet"].total == 4


def test_rules_reach_the_denoiser():
    config = QuantConfig.preset("w8a8-modiff")
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(
        pipe, QuantConfig(config.weight, config.activation, config.modulation, [Rule("conv_in", skip=True)])
    )
    assert type(pipe.unet.conv_in) is nn.Conv2d
    draw(pipe, arguments)
