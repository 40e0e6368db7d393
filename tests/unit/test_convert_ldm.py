"""Latent diffusion models and DiT against rebuilds of the originals."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from original_latents import DiT, LatentUNet, grid_embedding
from originals import FirstStage, randomize

from modiff.errors import CheckpointError
from modiff.teachers.convert.dit import OriginalDiTTransformer2DModel, convert_dit
from modiff.teachers.convert.first_stage import convert_first_stage
from modiff.teachers.convert.ldm import FixedHeadsUNet2DModel, convert_ldm, convert_ldm_unet

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 977])


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


BEDROOMS = {"head_channels": 16}
CHURCHES = {"heads": 4, "scale_shift": True, "by_blocks": True}


@pytest.mark.parametrize(
    "options",
    [
        BEDROOMS,
        CHURCHES,
        {**BEDROOMS, "layers": 2, "multipliers": (1, 2, 2), "attention": (1, 2)},
        {**CHURCHES, "layers": 2, "multipliers": (1, 2, 2), "attention": (0, 2)},
        {**BEDROOMS, "scale_shift": True, "attention": ()},
        {**BEDROOMS, "by_blocks": True, "attention": ()},
        {"heads": 2, "attention": (0, 1)},
        {"heads": 2, "multipliers": (1,), "attention": (0,), "layers": 2},
    ],
)
def test_unet(options):
    original = randomize(LatentUNet(**options))
    heads = {"num_heads": options.get("heads"), "num_head_channels": options.get("head_channels")}
    converted = convert_ldm_unet(original.state_dict(), sample_size=8, **heads)
    with torch.no_grad():
        close(converted(X, T).sample, original(X, T))


def test_fixed_heads_survive_saving(tmp_path):
    unet = convert_ldm_unet(randomize(LatentUNet(heads=4, attention=(0, 1))).state_dict(), 8, num_heads=4)
    assert isinstance(unet, FixedHeadsUNet2DModel)
    unet.save_pretrained(tmp_path)
    loaded = FixedHeadsUNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(X, T).sample, unet(X, T).sample)


@pytest.mark.parametrize(
    "options", [{}, {"attention": (1,), "layers": 2}, {"multipliers": (1, 2, 2), "latent": 3, "embedding": 3}]
)
@pytest.mark.parametrize("codes", [None, 7])
def test_first_stage(options, codes):
    original = randomize(FirstStage(codes, **options))
    converted = convert_first_stage(original.state_dict(), sample_size=4, scaling_factor=0.3)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    latents = torch.randn(2, options.get("latent", 4), 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        encoded = converted.encode(images)
        moments = encoded.latents if codes else encoded.latent_dist.parameters
        close(moments, original.encode(images))
        close(converted.decode(latents).sample, original.decode(latents))
    assert converted.config.scaling_factor == 0.3
    assert converted.config.sample_size == 4 * 2 ** (len(options.get("multipliers", (1, 2))) - 1)


def model_ckpt(**extra) -> dict[str, torch.Tensor]:
    """The layout of CompVis' file: UNet, its average under names without dots, first stage, schedule."""
    raw, average = (randomize(LatentUNet(**BEDROOMS), seed).state_dict() for seed in (0, 1))
    stage = randomize(FirstStage(7)).state_dict()
    return {
        **{f"model.diffusion_model.{key}": value for key, value in raw.items()},
        **{"model_ema." + f"diffusion_model{key}".replace(".", ""): value for key, value in average.items()},
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        **{f"first_stage_model.{key}": value for key, value in stage.items()},
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(1),
        "betas": torch.zeros(1000),
        **extra,
    }


class TestWholeModel:
    @pytest.mark.parametrize("ema", [True, False])
    def test_average_or_plain_weights(self, ema):
        model = convert_ldm(model_ckpt(), sample_size=8, num_head_channels=16, ema=ema)
        expected = randomize(LatentUNet(**BEDROOMS), seed=int(ema))
        with torch.no_grad():
            close(model.unet(X, T).sample, expected(X, T))
        assert type(model.unet) is UNet2DModel
        assert model.averaged is ema
        assert model.first_stage.config.scaling_factor == 1.0

    def test_scale_of_the_latents(self):
        model = convert_ldm(model_ckpt(scale_factor=torch.tensor(0.25)), sample_size=8, num_head_channels=16)
        assert model.first_stage.config.scaling_factor == 0.25

    def test_no_average(self):
        state = {key: value for key, value in model_ckpt().items() if not key.startswith("model_ema.")}
        with pytest.raises(CheckpointError, match=r"weights have no moving average, .*Set ema=False"):
            convert_ldm(state, sample_size=8, num_head_channels=16)

    def test_conditional_model(self):
        state = model_ckpt(**{"cond_stage_model.embedding.weight": torch.zeros(1)})
        with pytest.raises(CheckpointError, match="'cond_stage_model.embedding.weight' and 0 more .* is conditional"):
            convert_ldm(state, sample_size=8, num_head_channels=16)
        unet = {**LatentUNet(**BEDROOMS).state_dict(), "label_emb.weight": torch.zeros(1)}
        with pytest.raises(CheckpointError, match=r"The UNet is conditional \('label_emb.weight'\)"):
            convert_ldm_unet(unet, 8, num_head_channels=16)

    def test_another_kind_of_checkpoint(self):
        with pytest.raises(CheckpointError, match="This is not a CompVis latent diffusion model"):
            convert_ldm({"a": torch.zeros(1)}, 8, num_heads=8)
        with pytest.raises(CheckpointError, match="This is not a CompVis first stage"):
            convert_first_stage({"a": torch.zeros(1)}, 8)
        with pytest.raises(CheckpointError, match="This is not an unconditional CompVis UNet"):
            convert_ldm_unet({"a": torch.zeros(1)}, 8, num_heads=8)

    @pytest.mark.parametrize("heads", [{}, {"num_heads": 2, "num_head_channels": 16}])
    def test_heads_are_not_told_by_the_file(self, heads):
        with pytest.raises(CheckpointError, match="the file does not tell them. Give exactly one"):
            convert_ldm_unet(LatentUNet(**BEDROOMS).state_dict(), 8, **heads)

    def test_heads_that_do_not_fit(self):
        with pytest.raises(CheckpointError, match="num_heads is 5, which does not divide 32 channels"):
            convert_ldm_unet(LatentUNet(**BEDROOMS).state_dict(), 8, num_heads=5)

    def test_missing_and_unexpected_keys_are_named(self):
        state = dict(LatentUNet(**BEDROOMS).state_dict())
        state["output_blocks.0.9.weight"] = state.pop("middle_block.1.qkv.bias")
        with pytest.raises(
            CheckpointError, match="1 missing: 'middle_block.1.qkv.bias'; 1 unexpected: 'output_blocks.0.9.weight'"
        ):
            convert_ldm_unet(state, 8, num_head_channels=16)

    def test_blocks_that_do_not_fit(self):
        state = dict(LatentUNet(**BEDROOMS).state_dict())
        state["input_blocks.4.0.in_layers.2.weight"] = torch.zeros(1)
        with pytest.raises(CheckpointError, match="5 input_blocks do not fit 1 blocks for each resolution"):
            convert_ldm_unet(state, 8, num_head_channels=16)

    def test_posterior_of_another_width(self):
        state = FirstStage(latent=4, embedding=3).state_dict()
        with pytest.raises(CheckpointError, match="3 of another shape: .*quant_conv.weight"):
            convert_first_stage(state, 4)


class TestDiT:
    def original(self, **options) -> DiT:
        dit = randomize(DiT(**options))
        dit.pos_embed.data = grid_embedding(dit.pos_embed.shape[-1], dit.side)
        return dit

    @pytest.mark.parametrize("options", [{}, {"depth": 3, "heads": 6, "out": 4, "classes": 3}])
    def test_same_activations(self, options, tmp_path):
        original = self.original(**options)
        converted = convert_dit(original.state_dict(), num_heads=options.get("heads", 4))
        labels = torch.tensor([1, options.get("classes", 10)])  # the last one is the empty class
        with torch.no_grad():
            expected = original(X, T, labels)
            close(converted(X, T, class_labels=labels).sample, expected)
            converted.save_pretrained(tmp_path)
            loaded = OriginalDiTTransformer2DModel.from_pretrained(tmp_path)
            close(loaded(X, T, class_labels=labels).sample, expected)

    def test_heads_of_a_published_size(self):
        converted = convert_dit(self.original(width=384, heads=6, depth=1).state_dict())
        assert converted.config.num_attention_heads == 6

    def test_unknown_heads(self):
        with pytest.raises(CheckpointError, match="num_heads is None, and the file does not tell it for 48 channels"):
            convert_dit(self.original().state_dict())

    def test_learned_position_embedding(self):
        state = self.original().state_dict()
        state["pos_embed"] = state["pos_embed"] + 0.1
        with pytest.raises(CheckpointError, match="pos_embed is not the fixed sine-cosine embedding"):
            convert_dit(state, num_heads=4)

    def test_another_kind_of_checkpoint(self):
        with pytest.raises(CheckpointError, match="This is not an original DiT: 'x_embedder.proj.weight'"):
            convert_dit({"a": torch.zeros(1)})

    def test_missing_and_unexpected_keys_are_named(self):
        state = dict(self.original().state_dict())
        state["blocks.1.attn.q_norm.weight"] = state.pop("t_embedder.mlp.2.bias")
        with pytest.raises(CheckpointError, match="'t_embedder.mlp.2.bias'; 1 unexpected: 'blocks.1.attn.q_norm"):
            convert_dit(state, num_heads=4)
