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
from modiff.config.quant import Split
from modiff.errors import CheckpointError, ConfigError
from modiff.student.swap import operators
from modiff.teachers.convert.checkpoints import read_checkpoint
from modiff.teachers.convert.qdiffusion import convert_qdiffusion

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
        for name, weight in model.weights.items():
            parts = [f"{name}.first", f"{name}.second"] if name in model.splits else [name]
            packed = [student.get_submodule(part).packed for part in parts]
            held = [part.unpack() for part in packed]
            assert torch.equal(torch.cat([part.codes for part in held], dim=1), weight.codes)
            assert torch.equal(torch.cat([part.dequantize() for part in held], dim=1), weight.dequantize())
            assert sum(part.codes.numel() for part in packed) == -(-weight.codes.numel() * BITS // 8)
        assert set(model.packed()) == set(operators(student))
        torch.testing.assert_close(run(student), expected(X, T), rtol=1e-5, atol=1e-5)
        assert torch.equal(modiff.restore(student)(X, T).sample, full)

    @pytest.mark.parametrize("name", ["up_blocks.1.resnets.1.conv_shortcut", "up_blocks.0.resnets.0.conv_shortcut"])
    def test_a_split_shortcut_is_two_operators_with_the_scales_of_the_file(self, ddpm, name):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        at = model.splits[name]
        student = model.student("w4a8-modiff-paper")
        found = operators(student)
        assert name not in found
        first, second = (found[f"{name}.{half}"] for half in ("first", "second"))
        assert first.packed.spec == second.packed.spec == QuantSpec(BITS, "channel", symmetric=False)
        assert first.packed.shape[1] == at
        assert (first.module.bias is None, second.module.bias is None) == (False, True)
        whole = model.weights[name]
        for half, column in ((first, 0), (second, -1)):
            assert torch.equal(half.packed.scale.flatten(), whole.scale[:, column].flatten())
            assert torch.equal(half.packed.zero_point.flatten(), whole.zero_point[:, column].flatten())
        assert not torch.equal(first.packed.scale, second.packed.scale)
        assert not torch.equal(first.packed.zero_point, second.packed.zero_point)

    @pytest.mark.parametrize("layout", ["ddpm", "latent"])
    def test_halves_of_activations_are_quantized_as_in_the_original(self, layout):
        """Plain W4A4 on one split shortcut alone, against a rebuild of the original that quantizes each half itself."""
        if layout == "ddpm":
            network, theirs, ours = DDPM(layers=1), "up.1.block.0.nin_shortcut", "up_blocks.0.resnets.0.conv_shortcut"
        else:
            network = LatentUNet(heads=2, layers=1, channels=3)
            theirs, ours = "output_blocks.0.0.skip_connection", "up_blocks.0.resnets.0.conv_shortcut"
        state, expected = checkpoint(randomize(network), {theirs: 64})
        model = convert_qdiffusion(state, BITS, sample_size=8, **({} if layout == "ddpm" else {"num_heads": 2}))
        rule = Rule(ours, weight=QuantSpec(BITS, "channel"), activation=QuantSpec(BITS, "tensor", symmetric=False))
        result = run(model.student(unchanged_activations(rules=(rule,))))

        def quantized(x: torch.Tensor) -> torch.Tensor:
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            scale = (high - low) / (2**BITS - 1)
            zero = (-low / scale).round()
            return (((x / scale).round() + zero).clamp(0, 2**BITS - 1) - zero) * scale

        def halves(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            x = args[0]
            assert x[:, :64].std() / x[:, 64:].std() not in (0, 1)
            return (torch.cat([quantized(x[:, :64]), quantized(x[:, 64:])], dim=1),)

        shortcut = expected.get_submodule(theirs)
        with torch.no_grad():
            handle = shortcut.register_forward_pre_hook(halves)
            torch.testing.assert_close(result, expected(X, T), rtol=1e-4, atol=1e-4)
            handle.remove()
            shortcut.register_forward_pre_hook(lambda module, args: (quantized(args[0]),))
            assert (result - expected(X, T)).abs().max() > 1e-2  # one range for both is another result

    def test_splits_of_the_config_are_those_of_the_file(self, ddpm):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        own = Split("up_blocks.1.resnets.1.conv_shortcut", 32)
        for wrong, said in (
            (Split("up_blocks.1.resnets.0.conv_shortcut", 32), "in the file it is one operator"),
            (Split(own.name, 40), "in the file it is split at channel 32"),
        ):
            with pytest.raises(ConfigError, match=rf"{said}\. Leave splits empty"):
                model.student(unchanged_activations(splits=(wrong,) if wrong.name == own.name else (own, wrong)))
        student = model.student(unchanged_activations(splits=(own,)))
        assert {f"{name}.second" for name in model.splits} < set(operators(student))

    @pytest.mark.parametrize("at", [32, 48, 80])
    def test_halves_of_any_width(self, at):
        """The second half shorter than the first, or longer."""
        network = randomize(DDPM(layers=1))
        state, expected = checkpoint(network, {"up.1.block.0.nin_shortcut": at})
        model = convert_qdiffusion(state, BITS, sample_size=8)
        torch.testing.assert_close(run(model.student(unchanged_activations())), expected(X, T), rtol=1e-5, atol=1e-5)

    def test_latent_layout(self):
        network = randomize(LatentUNet(heads=2, layers=1, channels=3))
        state, expected = checkpoint(network, {"output_blocks.0.0.skip_connection": 64})
        student = convert_qdiffusion(state, BITS, sample_size=8, num_heads=2).student("w4a32-ptq-paper")
        torch.testing.assert_close(run(student), expected(X, T), rtol=1e-5, atol=1e-5)

    def test_is_modulated_saved_and_loaded(self, ddpm, tmp_path):
        model = convert_qdiffusion(ddpm[0], BITS, sample_size=8)
        student = model.student("w4a8-modiff-paper", keep_teacher=False)
        images = run(student, 3)
        rows = {row.name: row for row in modiff.describe(student)}
        assert {"up_blocks.1.resnets.1.conv_shortcut.first", "up_blocks.1.resnets.1.conv_shortcut.second"} < set(rows)
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
        for half in ("first", "second"):
            split = rows[f"up_blocks.0.resnets.0.conv_shortcut.{half}"]
            assert (split.activation, split.weight) == (eight, model.spec)
            assert rows[f"up_blocks.1.resnets.1.conv_shortcut.{half}"].weight is None
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
