"""Diffusers' caches, the real ones: exact on students without state, refused by name where operators keep one."""

from __future__ import annotations

import diffusers
import pipelines
import pytest
import torch
from diffusers import hooks

import modiff
from modiff import QuantConfig
from modiff.config.schedule import ReuseSchedule
from modiff.errors import ConfigError, ModiffError

MESSAGE = (
    r"skips modules whose operators keep a state; the two do not combine\..* QuantConfig.schedule \(docs/frontier.md\)"
)
RANGE = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 2000)}


def faster() -> diffusers.FasterCacheConfig:
    return diffusers.FasterCacheConfig(
        **RANGE,
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
    )


def broadcast() -> diffusers.PyramidAttentionBroadcastConfig:
    return diffusers.PyramidAttentionBroadcastConfig(**RANGE, current_timestep_callback=lambda: 500)


CACHES = {
    "first block": (lambda: diffusers.FirstBlockCacheConfig(threshold=0.9), "apply_first_block_cache"),
    "faster": (faster, "apply_faster_cache"),
    "attention broadcast": (broadcast, "apply_pyramid_attention_broadcast"),
}
if hasattr(diffusers, "TaylorSeerCacheConfig"):
    CACHES["taylor"] = (lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2), "apply_taylorseer_cache")
if hasattr(diffusers, "MagCacheConfig"):
    CACHES["magnitude"] = (
        lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
        "apply_mag_cache",
    )
EXACT = [name for name in CACHES if name != "faster"]  # which skips calls of guidance in one batch


@pytest.fixture
def flux():
    return pipelines.build(pipelines.flux)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cached_denoiser_is_refused_by_name_and_left_as_it_was(cache, flux) -> None:
    pipe, _ = flux
    pipe.transformer.enable_cache(CACHES[cache][0]())
    for quantize in (
        lambda: modiff.quantize(pipe.transformer, "w8a8-modiff"),
        lambda: modiff.quantize_pipeline(pipe, "w8a8-modiff"),
    ):
        with pytest.raises(ConfigError, match="The diffusers hook .* on .* " + MESSAGE):
            quantize()
    pipe.transformer.disable_cache()
    modiff.quantize_pipeline(pipe, "w8a8-modiff")


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_that_is_enabled_on_a_student_is_refused(cache, flux) -> None:
    pipe, arguments = flux
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    with pytest.raises(ConfigError, match="enable_cache on a quantized FluxTransformer2DModel " + MESSAGE):
        pipe.transformer.enable_cache(CACHES[cache][0]())
    pipelines.draw(pipe, arguments)
    getattr(hooks, CACHES[cache][1])(pipe.transformer, CACHES[cache][0]())
    with pytest.raises(ConfigError, match="The diffusers hook .* on .* " + MESSAGE):
        pipelines.draw(pipe, arguments)
    with pytest.raises(ConfigError, match=MESSAGE), modiff.trajectory(pipe.transformer):
        pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("cache", EXACT)
def test_a_student_without_state_runs_in_a_cache(cache, when) -> None:
    def draw(config: QuantConfig | None) -> torch.Tensor:
        pipe, arguments = pipelines.build(pipelines.flux)
        if when == "before":
            pipe.transformer.enable_cache(CACHES[cache][0]())
        if config is not None:
            modiff.quantize_pipeline(pipe, config)
        if when == "after":
            pipe.transformer.enable_cache(CACHES[cache][0]())
        return pipelines.draw(pipe, arguments)

    plain, arguments = pipelines.build(pipelines.flux)
    teacher = draw(None)
    assert not torch.equal(teacher, pipelines.draw(plain, arguments))  # the cache does something
    assert torch.equal(draw(QuantConfig()), teacher)
    quantized = draw(QuantConfig.preset("w8a8-ptq"))
    assert not torch.equal(quantized, teacher)
    assert (quantized - teacher).norm() / teacher.norm() < 0.05


def test_a_reuse_schedule_is_a_state(flux) -> None:
    pipe, _ = flux
    base = QuantConfig.preset("w8a8-ptq")
    modiff.quantize(pipe.transformer, QuantConfig(base.weight, base.activation, schedule=ReuseSchedule(every=2)))
    with pytest.raises(ConfigError, match=MESSAGE):
        pipe.transformer.enable_cache(CACHES["first block"][0]())


def test_restored_models_have_their_caches_back(flux) -> None:
    pipe, _ = flux
    student = modiff.quantize(pipe.transformer, "w8a8-modiff")
    with pytest.raises(ModiffError):
        student.enable_cache(CACHES["first block"][0]())
    modiff.restore(student).enable_cache(CACHES["first block"][0]())
    assert student.is_cache_enabled
