"""Norms and activations inside Triton's passes: blocks of diffusers on tensors of the CPU, through the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from recorders import Again, look_outputs_up
from torch import Tensor, nn
from torch.nn import functional as F

import modiff
from modiff.compiling import graphs
from modiff.compiling.modes import fused_blocks, uncompile
from modiff.kernels.backend import BACKENDS, Held
from modiff.kernels.fused import After, Before
from modiff.kernels.triton import launch, library  # noqa: F401 (registers the operators)

SAMPLE = modiff.QuantSpec(8, "sample")
SPECS = {
    "8 bit": SAMPLE,
    "range of the evaluation before": replace(SAMPLE, range="previous"),
    "powers of two": modiff.QuantSpec(4, "sample_channel", symmetric=False, scales="power_of_two"),
}


class Block(nn.Module):
    """A residual block with a time embedding and a shortcut, and attention, of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=16, groups=4)
        self.attention = Attention(
            32, heads=2, dim_head=16, norm_num_groups=4, residual_connection=True, bias=True, eps=1e-5
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.attention(self.resnet(x, t))


class Residual(nn.Module):
    """The residual block alone."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.resnet(x, t)


class Transformer(nn.Module):
    """A block of DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BasicTransformerBlock(
            32, 2, 16, activation_fn="gelu-approximate", num_embeds_ada_norm=4, norm_type="ada_norm_zero",
            norm_elementwise_affine=False, attention_bias=True,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        labels = torch.tensor([1, 2])
        return self.block(x.flatten(2).transpose(1, 2), timestep=(900 * t[:, 0]).long(), class_labels=labels)


def unet() -> nn.Module:
    return UNet2DModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


MODELS = {
    "unet": (unet, 3, 12),
    "residual": (Residual, 32, 1),
    "block": (Block, 16, 2),
    "transformer": (Transformer, 32, 1),
}


def student_of(model: str, spec: modiff.QuantSpec, **modulation: object) -> nn.Module:
    torch.manual_seed(0)
    weight = modiff.QuantSpec(8, "channel")
    teacher = MODELS[model][0]().eval().requires_grad_(False)
    return modiff.quantize(teacher, modiff.QuantConfig(weight, spec, modiff.Modulation(**modulation)))


def images(student: nn.Module, model: str, evaluations: int = 3) -> list[Tensor]:
    channels = MODELS[model][1]
    torch.manual_seed(1)
    start, end = torch.randn(2, 2, channels, 4, 4)
    found = []
    with modiff.trajectory(student) as run:
        for k in range(evaluations):
            x, t = start.lerp(end, 0.1 * k), torch.full((2,), 900 - 100 * k)
            x = student(x, t).sample if model == "unet" else student(x, t[:, None].expand(2, 16) / 1000)
            found.append(x)
    assert run.quantized == evaluations - 1
    return found


DEFAULT = [("block", "8 bit"), ("block", "powers of two"), ("transformer", "8 bit")]


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        pytest.param(model, spec, marks=() if (model, spec) in DEFAULT else pytest.mark.slow)
        for model in MODELS
        for spec in SPECS
    ],
)
def test_a_fused_student_is_the_unfused_one(model: str, spec: str) -> None:
    """The moments of norms are summed in another order, so that a residual next to the middle between two codes may
    round to the other one: a step of .8 % of a residual that is a tenth of the input (of 7 % at 4 bits)."""
    wanted = images(student_of(model, SPECS[spec]), model)
    student = modiff.compile(student_of(model, SPECS[spec]), "fused")
    fusion = fused_blocks(student)
    assert fusion is not None
    found = images(student, model)
    assert len(fusion.modules) == MODELS[model][2]
    assert all(block.forward.fused_calls == 2 for block in fusion.modules)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < (0.02 if spec == "powers of two" else 2e-3) * b.norm()


def test_the_description_names_what_runs_in_the_same_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BACKENDS, "onednn")  # there is none on a GPU
    student = modiff.compile(student_of("unet", SAMPLE))
    rows = {row.name: row.backend for row in modiff.describe(student)}
    assert rows["down_blocks.0.resnets.0.conv1"] == "triton, after group norm and SiLU"
    assert rows["down_blocks.0.resnets.0.conv2"] == "triton, after group norm and SiLU"
    assert rows["mid_block.attentions.0.to_q"] == "triton, after group norm"
    assert rows["mid_block.attentions.0.to_out.0"] == "triton"  # the sum that follows is a pass of its own
    assert rows["conv_in"] == "simulate (its 3 input channels are not a multiple of 16)"
    uncompile(student)
    assert {row.backend for row in modiff.describe(student) if row.name == "mid_block.attentions.0.to_q"} == {"triton"}
    rows = {row.name: row.backend for row in modiff.describe(modiff.compile(student_of("transformer", SAMPLE)))}
    assert rows["block.ff.net.2"] == "triton, after GELU"


def test_a_block_with_an_operator_that_no_kernel_computes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BACKENDS, "onednn")
    weight = modiff.QuantSpec(8, "channel")
    rule = modiff.Rule("mid_block.resnets.0.conv2", activation=modiff.QuantSpec(8, "channel"))
    config = modiff.QuantConfig(weight, SAMPLE, modiff.Modulation(), rules=(rule,))
    fusion = fused_blocks(modiff.compile(modiff.quantize(unet(), config)))
    assert fusion is not None
    assert fusion.obstacles["mid_block.resnets.0"].startswith(
        "conv2 runs on simulate (scales per channel do not factor"
    )


def normed(x: Tensor, before: Before) -> Tensor:
    """In float64, channels last."""
    x = x.double()
    if before.shift is not None:
        x = x + before.shift.double()[:, None]
    if before.norm == "group":
        x = F.group_norm(x.movedim(-1, 1), before.groups, eps=before.eps).movedim(1, -1)
    elif before.norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], eps=before.eps)
    if before.mul is not None and before.add is not None:
        mul, add = (t.double() if t.ndim == 1 else t.double()[:, None] for t in (before.mul, before.add))
        x = x * mul + add
    kinds = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    return kinds[before.activation](x) if before.activation else x


BEFORES = {
    "group norm of a sum, SiLU": Before("group", "silu", 4, torch.randn(32), torch.randn(32), torch.randn(2, 32), 1e-5),
    "adaptive layer norm": Before("layer", None, 1, torch.randn(2, 32), torch.randn(2, 32), None, 1e-6),
    "GELU": Before(activation="gelu"),
    "GELU by tanh": Before(activation="gelu_tanh"),
}


@pytest.mark.parametrize("before", BEFORES)
@pytest.mark.parametrize("per", [launch.SAMPLE, launch.SAMPLE_CHANNEL])
def test_ranges_and_codes_of_what_a_norm_makes(before: str, per: int) -> None:
    torch.manual_seed(0)
    how, a, held = BEFORES[before], 2 * torch.randn(2, 1, 9, 32), torch.randn(2, 1, 9, 32)
    residual = normed(a[:, 0], how)[:, None] - held.double()
    norm = {None: -1, "layer": 0, "group": how.groups}[how.norm]
    arguments = (per, [0, 0, 0, 0], 32, 7, 1.0, True, False, True, 4, 1.0, norm, how.eps, how.mul, how.add, how.shift)
    before_, codes = held.clone(), None
    codes, unit, probe = torch.ops.modiff.triton_quantize(
        a, held, None, None, None, None, None, *arguments, how.activation
    )
    dims = (1, 2) if per == launch.SAMPLE_CHANNEL else (1, 2, 3)
    own = residual.abs().amax(dims, keepdim=True) / 7
    if per == launch.SAMPLE_CHANNEL:
        largest = own.amax(3, keepdim=True)
        own = largest * 2.0 ** -(largest / own).log2().floor().clamp(0, 4)
    torch.testing.assert_close(
        unit.double(), (own.amax((1, 2, 3)) / (16 if per == launch.SAMPLE_CHANNEL else 1)), rtol=1e-5, atol=0
    )
    values = codes.double() * unit.double().view(-1, 1, 1, 1)
    assert ((values - residual).abs() <= 0.5001 * own).all()
    torch.testing.assert_close(held, before_ + values.float(), rtol=0, atol=1e-6)
    assert probe == 0


def test_what_follows_is_a_tensor_of_its_own() -> None:
    triton = BACKENDS["triton"]
    config = modiff.QuantConfig(modiff.QuantSpec(8, "channel"), SAMPLE, modiff.Modulation())
    student = modiff.quantize(nn.Sequential(nn.Linear(32, 32)), config)
    execution = student[0].execution(torch.randn(2, 3, 32))
    x, o_hat, residual, gate = (torch.randn(2, 3, 32) for _ in range(4))
    gate = gate[:, 0].contiguous()
    after = After(residual, gate, 0.5, torch.float16)
    held = Held(x.clone() + 0.1)
    found, _ = triton.advance_fused(x, held, execution.prepared, execution.quantizer, o_hat, Before(), after)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), (gate[:, None] * o_hat + residual) / 2, rtol=1e-3, atol=1e-3)
    for after, same in ((After(dtype=None), True), (After(lends=True), True), (After(), False)):
        given, _ = triton.advance_fused(x, held, execution.prepared, execution.quantizer, o_hat, Before(), after)
        assert (given is o_hat) == same
        assert torch.equal(given, o_hat)


def test_recorded_evaluations_run_the_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA graphs: two trajectories, of which the second is replayed from the start."""
    look_outputs_up(monkeypatch)
    Again.made = []
    expected = images(
        modiff.compile(student_of("residual", SPECS["range of the evaluation before"]), "fused"), "residual", 4
    )
    student = modiff.compile(student_of("residual", SPECS["range of the evaluation before"]), "fused")
    graphs.use_graphs(student, recorder=Again)
    for replays in (1, 1 + 3):
        found = images(student, "residual", 4)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert [each.replays for each in Again.made] == [replays]
