"""Pipelines that call their denoiser more than once in a step, or that have several denoisers."""

import pytest
import torch

import modiff
from modiff import QuantConfig
from modiff.errors import ConfigError, TrajectoryError

pytest.importorskip("diffusers")
import pipelines  # noqa: E402
from own_pipelines import OwnPipeline, own  # noqa: E402
from pipelines import build, draw  # noqa: E402


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


@pytest.mark.parametrize(("calls", "guide_until", "made"), [(2, 2, 1), (3, 9, 3), (1, 9, 1)])
def test_a_step_with_other_calls_than_were_named_is_refused(calls, guide_until, made):
    pipe = modiff.quantize_pipeline(own(calls=calls), "w8a8-modiff", contexts=("uncond", "cond"))
    with pytest.raises(
        TrajectoryError, match=rf"A step made {made} denoiser calls, but contexts names 2: uncond, cond\. Where guid"
    ):
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
