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
from own_pipelines import OwnPipeline, own  # noqa: E402
from pipelines import BUILDERS, EVALUATIONS, build, draw, student  # noqa: E402


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
    config = QuantConfig.preset("w8a4-modiff")
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
    config = QuantConfig.preset("w8a4-modiff")
    modiff.quantize_pipeline(pipe, QuantConfig(config.weight, config.activation, modiff.Modulation(**modulation)))
    images = draw(pipe, arguments)
    assert not any(row.constant and "attn2" in row.name for row in modiff.describe(pipe.transformer))
    assert torch.equal(draw(pipe, arguments), images)


def test_a_projection_that_is_no_function_of_its_input_is_reported():
    pipe, arguments = build(pipelines.pixart_sigma)
    modiff.quantize_pipeline(pipe, "w8a4-modiff")
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
        modiff.quantize_pipeline(pipe, "w8a4-modiff")
    assert torch.equal(pipe(), images)


def test_denoisers_that_are_students_already_are_only_wrapped(tmp_path):
    pipe = modiff.quantize_pipeline(own(calls=1), "w4a4-modiff")
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
    modiff.quantize_pipeline(pipe, "w8a4-modiff")
    images = draw(pipe, arguments)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(other, cls)
        assert other.unet is not pipe.unet
        assert torch.equal(draw(other, arguments), images)
        modiff.restore_pipeline(other)
    assert torch.equal(draw(pipe, arguments), images)


def test_a_pipeline_made_of_its_components_works():
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a4-modiff")
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other, arguments), draw(pipe, arguments))


def test_the_call_keeps_its_signature_and_help():
    pipe, _ = build(pipelines.ddim)
    before = inspect.signature(pipe.__call__), type(pipe).__call__.__doc__, repr(pipe)
    modiff.quantize_pipeline(pipe, "w8a8-ptq")
    assert (inspect.signature(pipe.__call__), type(pipe).__call__.__doc__, repr(pipe)) == before


def test_compiled_denoisers_are_refused():
    pipe, arguments = build(pipelines.ddim)
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    with pytest.raises(ConfigError, match=r"'unet' is compiled; .* Use the .* and modiff.compile\(pipe.unet\)"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    pipe.unet = unet
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    pipe.unet = torch.compile(unet, backend="eager")
    with pytest.raises(ConfigError, match="'unet' is compiled"):
        draw(pipe, arguments)
    pipe.unet = unet
    unet.mid_block.compile(backend="eager")
    with pytest.raises(ConfigError, match="'unet.mid_block' is compiled"):
        draw(pipe, arguments)


class Lora(nn.Module):
    """The part of peft's layers that matters here."""

    active_adapters = ("style",)
    disable_adapters = False

    def __init__(self, base, merged):
        super().__init__()
        self.base_layer, self.merged = base, merged
        self.lora_A = nn.Linear(base.in_features, 1)

    def forward(self, x):
        return self.base_layer(x)


def test_lora_is_refused_by_name_unless_fused():
    pipe, arguments = build(pipelines.ddim)
    teacher, embedding = draw(pipe, arguments), pipe.unet.time_embedding
    embedding.linear_1 = Lora(embedding.linear_1, merged=False)
    with pytest.raises(
        ConfigError, match=r"'unet.time_embedding.linear_1' holds LoRA .* not fused: style. Call pipe.fuse_lora\(\) and"
    ):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    embedding.linear_1.merged = True
    modiff.quantize_pipeline(pipe, QuantConfig())
    assert torch.equal(draw(pipe, arguments), teacher)
    assert "time_embedding.linear_1.base_layer" in {row.name for row in modiff.describe(pipe.unet)}


METHODS = ("save_pretrained", "load_lora_weights", "unload_lora_weights", "fuse_qkv_projections")


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_act_on_the_original_operators_are_refused(method, tmp_path):
    pipe, _ = build(pipelines.stable_diffusion_xl)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    with pytest.raises(ConfigError, match=f"{method} on a quantized pipeline would "):
        getattr(pipe, method)(tmp_path)


def test_refused_methods_come_back_when_the_denoiser_is_restored(tmp_path):
    pipe, _ = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    modiff.restore(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert '"_class_name": "DDIMPipeline"' in (tmp_path / "model_index.json").read_text()


def test_rules_reach_the_denoiser():
    config = QuantConfig.preset("w8a8-modiff")
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(
        pipe, QuantConfig(config.weight, config.activation, config.modulation, [Rule("conv_in", skip=True)])
    )
    assert type(pipe.unet.conv_in) is nn.Conv2d
    draw(pipe, arguments)
