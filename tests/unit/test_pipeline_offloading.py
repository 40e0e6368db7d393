"""What quantized pipelines refuse, and what other libraries may do around them: offloading, compiling, LoRA."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import modiff
from modiff import QuantConfig
from modiff.errors import ConfigError, TrajectoryError

pytest.importorskip("diffusers")
import pipelines  # noqa: E402
from pipelines import BUILDERS, EVALUATIONS, build, draw  # noqa: E402


def student(pipe):
    return next(getattr(pipe, name) for name in ("unet", "transformer") if hasattr(pipe, name))


def test_offloading_moves_the_denoiser_within_a_call():
    """As enable_model_cpu_offload does: in before the first evaluation, out when the next model's turn comes."""
    pipe, arguments = build(pipelines.stable_diffusion)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)
    moves = []

    def onload(module, _):
        moves.append("in")
        module.to("cpu")

    handle = pipe.unet.register_forward_pre_hook(onload)
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: moves.append("out") or pipe.unet.to("cpu") and None)
    assert torch.equal(draw(pipe, arguments), images)
    assert moves == ["in"] * 5 + ["out"]
    handle.remove()
    pipe.unet.register_forward_pre_hook(lambda module, _: module.to(torch.float64) and None)
    with pytest.raises(TrajectoryError, match="cannot be moved or cast inside a trajectory"):
        draw(pipe, arguments)


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


def test_layerwise_casting_is_refused():
    pipe, _ = build(pipelines.flux)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(
        ConfigError, match=r"diffusers hook 'layerwise_casting' on module .* moves or casts .* Disable it"
    ):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")


def test_accelerate_hooks_on_single_operators_are_refused():
    pipe, _ = build(pipelines.ddim)
    pipe.unet._hf_hook = object()  # of model offloading: moves the denoiser as a whole
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    modiff.restore_pipeline(pipe)
    pipe.unet.conv_in._hf_hook = object()
    with pytest.raises(ConfigError, match="'unet.conv_in' is offloaded by accelerate on its own. Load the pipeline"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    del pipe.unet.conv_in._hf_hook
    fetching = SimpleNamespace(offload=True)  # of weights, by the hook of a denoiser that is loaded as a whole
    for hook in (fetching, SimpleNamespace(hooks=(object(), fetching))):
        pipe.unet._hf_hook = hook
        with pytest.raises(ConfigError, match="'unet' is offloaded by accelerate on its own. Load the pipeline"):
            modiff.quantize_pipeline(pipe, "w8a8-modiff")


ORDERS = ["offload, quantize", "quantize, offload"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("builder", [b for b in BUILDERS if b is not pipelines.ldm])  # which names no order to offload
def test_model_offloading_by_accelerate_itself(builder, order):
    """diffusers' own enable_model_cpu_offload, onto "cpu:0": PyTorch copies all weights, as to a GPU, in every call."""
    pytest.importorskip("accelerate")
    pipe, arguments = build(builder)
    teacher = draw(pipe, arguments)
    images = draw(modiff.quantize_pipeline(pipe, "w8a8-modiff"), arguments)

    pipe, arguments = build(builder)
    for what in order.split(", "):
        if what == "offload":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            modiff.quantize_pipeline(pipe, "w8a8-modiff")
    denoiser, copies = student(pipe), set()
    weight = next(denoiser.parameters())
    denoiser.register_forward_hook(lambda module, *_: copies.add(next(module.parameters()).data_ptr()))
    assert torch.equal(draw(pipe, arguments), images)
    assert len(copies | {weight.data_ptr()}) > 1  # it was moved
    assert torch.equal(draw(pipe, arguments), images)
    evaluations = EVALUATIONS.get(builder.__name__, 4)
    counts = next(iter(pipe.trajectories.values()))
    assert (counts.total, counts.quantized) == (evaluations, evaluations - 1)
    modiff.restore_pipeline(pipe)
    assert torch.equal(draw(pipe, arguments), teacher)
    assert type(denoiser._hf_hook).__name__ == "CpuOffload"
    pipe.remove_all_hooks()
    assert torch.equal(draw(pipe, arguments), teacher)


def test_model_offloading_by_accelerate_where_the_denoiser_is_on_its_device():
    """As in all evaluations but the first on a GPU: nothing is moved, and the prompt's keys are computed once."""
    accelerate = pytest.importorskip("accelerate")
    pipe, arguments = build(pipelines.stable_diffusion)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    images = draw(pipe, arguments)
    fixed = [row.name for row in modiff.describe(pipe.unet) if row.constant]
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    accelerate.cpu_offload_with_hook(pipe.vae, torch.device("cpu"), prev_module_hook=hook)
    assert torch.equal(draw(pipe, arguments), images)
    assert fixed
    assert [row.name for row in modiff.describe(pipe.unet) if row.constant] == fixed


@pytest.mark.parametrize("options", [{}, {"preload_module_classes": ["UNet2DModel"]}], ids=["operators", "whole"])
def test_sequential_offloading_by_accelerate_is_refused(options):
    accelerate = pytest.importorskip("accelerate")
    pipe, arguments = build(pipelines.ddim)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"), **options)
    with pytest.raises(ConfigError, match=r"is offloaded by accelerate on its own\. Load the pipeline without"):
        modiff.quantize_pipeline(pipe, "w8a8-modiff")
    pipe, arguments = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"), **options)
    with pytest.raises(ConfigError, match=r"is offloaded by accelerate on its own\. Load the pipeline without"):
        draw(pipe, arguments)


def test_a_trajectory_of_ones_own_is_not_offloaded():
    accelerate = pytest.importorskip("accelerate")
    pipe, _ = build(pipelines.ddim)
    unet = modiff.quantize(pipe.unet, QuantConfig.preset("w8a8-modiff"))
    accelerate.cpu_offload_with_hook(unet, torch.device("cpu:0"))
    with pytest.raises(TrajectoryError, match="cannot be moved or cast inside a trajectory"), modiff.trajectory(unet):
        unet(torch.zeros(1, 3, 8, 8), 10)


METHODS = ("save_pretrained", "load_lora_weights", "unload_lora_weights", "fuse_qkv_projections")


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_act_on_the_original_operators_are_refused(method, tmp_path):
    pipe, _ = build(pipelines.stable_diffusion_xl)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    with pytest.raises(ConfigError, match=f"{method} on a quantized pipeline would "):
        getattr(pipe, method)(tmp_path)


def test_offloading_of_single_operators_is_refused():
    pipe, _ = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    with pytest.raises(ConfigError, match="moves the weight of each operator, .* Use enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


def test_refused_methods_come_back_when_the_denoiser_is_restored(tmp_path):
    pipe, _ = build(pipelines.ddim)
    modiff.quantize_pipeline(pipe, "w8a8-modiff")
    modiff.restore(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert '"_class_name": "DDIMPipeline"' in (tmp_path / "model_index.json").read_text()
