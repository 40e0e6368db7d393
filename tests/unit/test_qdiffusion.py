"""Q-Diffusion checkpoints: synthetic files of the published layout."""

from __future__ import annotations

import copy

import pytest
import torch
from original_latents import LatentUNet
from originals import DDPM, randomize
from torch import nn

import modiff
from modiff import QuantConfig, QuantSpec, Rule
from modiff.errors import CheckpointError, ConfigError
from modiff.teachers.checkpoints import read_checkpoint
from modiff.teachers.qdiffusion import convert_qdiffusion

BITS = 4
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 977])


def quantizer(weight: torch.Tensor, generator: torch.Generator) -> tuple[dict, torch.Tensor]:
    """State of a calibrated AdaRound quantizer, and the weight that it stands for."""
    flat = weight.flatten(1)
    shape = (len(weight), *[1] * (weight.ndim - 1))
    low, high = flat.amin(dim=1).clamp(max=0) * 0.9, flat.amax(dim=1).clamp(min=0) * 0.9
    delta = ((high - low) / (2**BITS - 1)).view(shape)
    zero = (-low.view(shape) / delta).round()
    alpha = torch.randn(weight.shape, generator=generator)  # random: not the nearest rounding
    up = (alpha >= 0).float()
    value = (((weight / delta).floor() + up + zero).clamp(0, 2**BITS - 1) - zero) * delta
    return {"delta": delta, "zero_point": zero, "alpha": alpha}, value


def checkpoint(network: nn.Module, splits: dict[str, int]) -> tuple[dict[str, torch.Tensor], nn.Module]:
    """File contents for a network, and a copy of the network with fake-quantized weights."""
    generator = torch.Generator().manual_seed(5)
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    expected = copy.deepcopy(network)
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            continue
        weight, at = module.weight.data, splits.get(name)
        halves = [weight] if at is None else [weight[:, :at], weight[:, at:]]
        values = []
        for half, suffix in zip(halves, ("", "_0"), strict=False):
            own, value = quantizer(half, generator)
            state.update({f"model.{name}.weight_quantizer{suffix}.{key}": v for key, v in own.items()})
            state[f"model.{name}.act_quantizer{suffix}.delta"] = torch.tensor(0.1)
            state[f"model.{name}.act_quantizer{suffix}.zero_point"] = torch.tensor(3.0)
            values.append(value)
        expected.get_submodule(name).weight.data = torch.cat(values, dim=1)
    return state, expected


@pytest.fixture(scope="module")
def ddpm() -> tuple[dict[str, torch.Tensor], nn.Module]:
    """With split shortcuts at what came from below and what was skipped."""
    return checkpoint(randomize(DDPM(layers=1)), {"up.1.block.0.nin_shortcut": 64, "up.0.block.1.nin_shortcut": 32})


def test_cifar10_layout(ddpm, tmp_path):
    state, expected = ddpm
    torch.save(state, tmp_path / "cifar_w4a8_ckpt.pth")
    model = convert_qdiffusion(read_checkpoint(tmp_path / "cifar_w4a8_ckpt.pth"), BITS, sample_size=8)
    operators = [n for n, m in model.denoiser.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert list(model.weights) == operators
    for name, weight in model.weights.items():
        assert weight.codes.shape == model.denoiser.get_submodule(name).weight.shape
        assert torch.equal(weight.codes, weight.codes.round())
        assert weight.codes.min() >= 0
        assert weight.codes.max() <= 15
    with torch.no_grad():
        full = model.denoiser(X, T).sample
        result = model.simulate()(X, T).sample
        torch.testing.assert_close(result, expected(X, T), rtol=1e-5, atol=1e-5)
    assert (result - full).std() > 0.05  # 4 bits and random rounding are far from full precision


def test_halves_of_a_split_shortcut_keep_their_own_scales(ddpm):
    state, _ = ddpm
    weight = convert_qdiffusion(state, BITS, sample_size=8).weights["up_blocks.1.resnets.1.conv_shortcut"]
    prefix = "model.up.0.block.1.nin_shortcut.weight_quantizer"
    assert torch.equal(weight.scale[:, :32], state[f"{prefix}.delta"].expand(-1, 32, 1, 1))
    assert torch.equal(weight.scale[:, 32:], state[f"{prefix}_0.delta"].expand(-1, 32, 1, 1))
    assert not torch.equal(weight.scale[:, 0], weight.scale[:, 32])
    assert weight.num_scales == 2 * len(weight.codes)


def test_latent_layout_with_fused_projections():
    network = randomize(LatentUNet(heads=2, layers=1, channels=3))
    state, expected = checkpoint(network, {"output_blocks.0.0.skip_connection": 64})
    model = convert_qdiffusion(state, BITS, sample_size=8, num_heads=2)
    with torch.no_grad():
        torch.testing.assert_close(model.simulate()(X, T).sample, expected(X, T), rtol=1e-5, atol=1e-5)
    query = model.weights["mid_block.attentions.0.to_q"]
    assert query.codes.shape == (64, 64)
    assert query.scale.shape == (64, 1)
    assert query.num_scales == 64


def test_not_reconstructed_operators_round_to_nearest(ddpm):
    state = dict(ddpm[0])
    del state["model.conv_in.weight_quantizer.alpha"]
    weight = convert_qdiffusion(state, BITS, sample_size=8).weights["conv_in"]
    full = state["model.conv_in.weight"]
    inside = (weight.codes > 0) & (weight.codes < 15)
    assert ((weight.dequantize() - full).abs() <= weight.scale * 0.5001)[inside].all()


def test_runs_as_a_student(ddpm):
    model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
    student = modiff.quantize(model.simulate(), modiff.QuantConfig.preset("w32a8-modiff"))
    with modiff.trajectory(student) as run:
        first = student(X, T).sample
        student(X, T)
    torch.testing.assert_close(first, ddpm[1](X, T), rtol=1e-5, atol=1e-5)
    assert run.quantized == 1


def unchanged_activations(bits: int = BITS, **more) -> QuantConfig:
    return QuantConfig(weight=QuantSpec(bits, "channel"), **more)


def run(student: nn.Module, times: int = 1) -> torch.Tensor:
    with modiff.trajectory(student):
        return [student(X, T).sample for _ in range(times)][-1]


class TestStudent:
    """The file's codes as operators: nothing is rounded a second time."""

    def test_multiplies_the_codes_of_the_file(self, ddpm):
        state, expected = ddpm
        model = convert_qdiffusion(state, BITS, sample_size=8)
        full = model.denoiser(X, T).sample
        student = model.student(unchanged_activations())
        assert student is model.denoiser
        assert list(model.packed()) == list(model.weights)
        for name, weight in model.weights.items():
            packed = student.get_submodule(name).packed
            held = packed.unpack()
            assert torch.equal(held.codes, weight.codes)
            assert torch.equal(held.dequantize(), weight.dequantize())
            assert packed.codes.numel() == -(-weight.codes.numel() * BITS // 8)
        torch.testing.assert_close(run(student), expected(X, T), rtol=1e-5, atol=1e-5)
        assert torch.equal(modiff.restore(student)(X, T).sample, full)

    @pytest.mark.parametrize("name", ["up_blocks.1.resnets.1.conv_shortcut", "up_blocks.0.resnets.0.conv_shortcut"])
    def test_a_split_shortcut_has_two_scales_for_each_output(self, ddpm, name):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        split = model.splits[name]
        assert model.spec(name) == QuantSpec(BITS, "group", symmetric=False, group_size=split)
        assert model.spec("conv_in") == QuantSpec(BITS, "channel", symmetric=False)
        packed = model.packed()[name]
        assert packed.scale.shape[1] == -(-packed.shape[1] // split) >= 2
        assert torch.equal(packed.scale[:, 0], model.weights[name].scale[:, 0])
        for group in range(1, packed.scale.shape[1]):
            assert torch.equal(packed.scale[:, group], model.weights[name].scale[:, -1])
        assert not torch.equal(packed.scale[:, 0], packed.scale[:, 1])
        assert not torch.equal(packed.zero_point[:, 0], packed.zero_point[:, 1])

    @pytest.mark.parametrize("at", [32, 48, 80])
    def test_halves_of_any_width(self, at):
        """The second half shorter than the first, or longer: it then has several groups of one scale."""
        network = randomize(DDPM(layers=1))
        state, expected = checkpoint(network, {"up.1.block.0.nin_shortcut": at})
        model = convert_qdiffusion(state, BITS, sample_size=8)
        torch.testing.assert_close(run(model.student(unchanged_activations())), expected(X, T), rtol=1e-5, atol=1e-5)

    def test_latent_layout(self):
        network = randomize(LatentUNet(heads=2, layers=1, channels=3))
        state, expected = checkpoint(network, {"output_blocks.0.0.skip_connection": 64})
        student = convert_qdiffusion(state, BITS, sample_size=8, num_heads=2).student("w4a32-ptq")
        torch.testing.assert_close(run(student), expected(X, T), rtol=1e-5, atol=1e-5)

    def test_is_modulated_saved_and_loaded(self, ddpm, tmp_path):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        student = model.student("w4a8-modiff", keep_teacher=False)
        images = run(student, 3)
        rows = {row.name: row for row in modiff.describe(student)}
        assert rows["up_blocks.1.resnets.1.conv_shortcut"].weight.group_size == 32
        assert {row.activation.bits for row in rows.values()} == {8}
        modiff.save(student, tmp_path / "packed")
        other = convert_qdiffusion(ddpm[0], BITS, sample_size=8).denoiser
        assert torch.equal(run(modiff.load(tmp_path / "packed", other), 3), images)

    def test_rules_of_the_config_hold_for_split_shortcuts_too(self, ddpm):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        eight = QuantSpec(8, "sample")
        rules = (
            Rule("up_blocks.*", activation=eight, weight=QuantSpec(BITS, "channel")),
            Rule("up_blocks.1.resnets.1.conv_shortcut", weight=None),
            Rule("conv_in", skip=True),
        )
        activation = QuantSpec(6, "sample")
        student = model.student(unchanged_activations(activation=activation, rules=rules))
        rows = {row.name: row for row in modiff.describe(student)}
        split = rows["up_blocks.0.resnets.0.conv_shortcut"]
        assert (split.activation, split.weight.group_size) == (eight, 64)
        assert rows["up_blocks.1.resnets.1.conv_shortcut"].weight is None
        assert rows["conv_in"].skipped
        assert rows["mid_block.resnets.0.conv1"].activation == activation

    def test_other_bits_are_refused(self, ddpm):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        with pytest.raises(ConfigError, match="asks for weights of 8 bits, but the file holds weights of 4 bits. Give"):
            model.student("w8a8-modiff")
        with pytest.raises(ConfigError, match="The config leaves weights in full precision, but the file holds"):
            model.student("w32a8-modiff")
        with pytest.raises(ConfigError, match="The rule 'conv_in' asks for weights of 8 bits"):
            model.student(unchanged_activations(rules=(Rule("conv_in", weight=QuantSpec(8, "channel")),)))
        assert isinstance(model.denoiser.conv_in, nn.Conv2d)


class TestRefuses:
    def test_other_bits(self, ddpm):
        with pytest.raises(CheckpointError, match="3 bits allow positive scales and whole zero points 0 to 7. Set"):
            convert_qdiffusion(ddpm[0], 3, sample_size=8)
        with pytest.raises(CheckpointError, match="bits is 32; allowed is 2 to 8"):
            convert_qdiffusion(ddpm[0], 32, sample_size=8)

    def test_broken_zero_point(self, ddpm):
        state = {**ddpm[0], "model.conv_in.weight_quantizer.zero_point": torch.full((32, 1, 1, 1), 2.5)}
        with pytest.raises(CheckpointError, match="conv_in.weight_quantizer has .* positive scales and whole zero"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_operator_without_quantizer(self, ddpm):
        state = dict(ddpm[0])
        del state["model.mid.attn_1.q.weight_quantizer.delta"]
        with pytest.raises(CheckpointError, match="'mid.attn_1.q.weight_quantizer.delta' is missing"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_split_without_its_second_half(self, ddpm):
        state = {k: v for k, v in ddpm[0].items() if "up.0.block.1.nin_shortcut.weight_quantizer_0" not in k}
        with pytest.raises(CheckpointError, match="covers 32 of 64 input channels, and .* holds 1 weight quantizer"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_scale_for_the_whole_tensor(self, ddpm):
        state = {**ddpm[0], "model.conv_in.weight_quantizer.delta": torch.tensor(0.1)}
        with pytest.raises(CheckpointError, match=r"conv_in.weight_quantizer.delta has shape \[\], but its weight"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_quantizer_of_no_operator(self, ddpm):
        state = {**ddpm[0], "model.extra.weight_quantizer.delta": torch.ones(1)}
        with pytest.raises(CheckpointError, match="1 weight quantizers belong to no operator, .*'extra.weight_quant"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_missing_weight(self, ddpm):
        state = {key: value for key, value in ddpm[0].items() if key != "model.mid.attn_1.norm.bias"}
        with pytest.raises(CheckpointError, match="1 missing: 'mid.attn_1.norm.bias'"):
            convert_qdiffusion(state, BITS, sample_size=8)

    def test_another_kind_of_checkpoint(self):
        with pytest.raises(CheckpointError, match="This is not a Q-Diffusion checkpoint"):
            convert_qdiffusion({"conv_in.weight": torch.zeros(1)}, BITS, sample_size=8)
