"""Reading original checkpoints, and DDPM UNets against a rebuild of the original."""

from __future__ import annotations

import argparse

import pytest
import torch
from originals import DDPM, randomize
from safetensors.torch import save_file

from modiff.errors import CheckpointError
from modiff.teachers.convert.checkpoints import read_checkpoint
from modiff.teachers.convert.ddpm import convert_ddpm


@pytest.fixture(scope="module")
def original() -> DDPM:
    return randomize(DDPM())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"multipliers": (1, 2, 2), "attention": (1,), "layers": 1},
        {"multipliers": (1, 1, 2), "attention": (), "channels": 1},
        {"multipliers": (1,), "attention": (0,)},
    ],
)
def test_same_activations(options):
    original = randomize(DDPM(**options))
    converted = convert_ddpm(original.state_dict(), sample_size=16)
    x = torch.randn(2, options.get("channels", 3), 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 977])
    with torch.no_grad():
        expected, result = original(x, t), converted(x, t).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert converted.config.sample_size == 16
    assert not converted.training


def test_widths_of_the_cifar10_model():
    with torch.device("meta"):
        state = DDPM(128, (1, 2, 2, 2), layers=2, attention=(1,)).state_dict()
    state = {key: torch.zeros(value.shape) for key, value in state.items()}
    unet = convert_ddpm(state, sample_size=32)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307  # the 35.7M parameters of the paper


class TestStrictReport:
    def test_missing_and_unexpected_keys_are_named(self, original):
        state = dict(original.state_dict())
        state["down.0.block.0.extra"] = state.pop("down.0.block.0.norm1.bias")
        with pytest.raises(
            CheckpointError,
            match=r"fit a DDPM UNet.* 1 missing: 'down.0.block.0.norm1.bias'; 1 unexpected: 'down.0.block.0.extra'",
        ):
            convert_ddpm(state, 16)

    def test_no_more_than_ten(self, original):
        state = {**original.state_dict(), **{f"extra.{i}": torch.zeros(1) for i in range(13)}}
        with pytest.raises(CheckpointError, match=r"13 unexpected: 'extra.0', .*'extra.6' and 3 more"):
            convert_ddpm(state, 16)

    def test_another_shape(self, original):
        state = {**original.state_dict(), "norm_out.weight": torch.zeros(7)}
        with pytest.raises(CheckpointError, match=r"1 of another shape: .*norm_out.weight \[7\], not for \[32\]"):
            convert_ddpm(state, 16)

    def test_another_kind_of_checkpoint(self):
        with pytest.raises(
            CheckpointError, match=r"This is not a DDPM UNet .*'conv_in.weight', .* missing. .*holds 'a.b'"
        ):
            convert_ddpm({"a.b": torch.zeros(1)}, 16)

    def test_levels_with_a_gap(self, original):
        state = {**original.state_dict(), "down.4.block.0.conv1.weight": torch.zeros(1)}
        with pytest.raises(CheckpointError, match=r"'down.2.block.0.conv1.weight', 'down.3.* missing"):
            convert_ddpm(state, 16)


class TestReadCheckpoint:
    def same(self, result, original):
        state = original.state_dict()
        assert result.keys() == state.keys()
        assert all(torch.equal(result[key], state[key]) for key in state)

    @pytest.mark.parametrize(
        "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"ema": s, "model": {}}]
    )
    def test_pickles(self, tmp_path, original, wrap):
        torch.save(wrap(dict(original.state_dict())), tmp_path / "model.ckpt")
        self.same(read_checkpoint(tmp_path / "model.ckpt"), original)

    def test_list_of_the_ddim_repository(self, tmp_path, original):
        state = original.state_dict()
        parallel = {f"module.{key}": value + 1 for key, value in state.items()}
        torch.save([parallel, {"lr": 1.0}, 3, 100, dict(state)], tmp_path / "ckpt.pth")
        self.same(read_checkpoint(tmp_path / "ckpt.pth"), original)
        raw = read_checkpoint(tmp_path / "ckpt.pth", ema=False)
        assert torch.equal(raw["conv_in.bias"], state["conv_in.bias"] + 1)

    def test_model_beside_its_average(self, tmp_path):
        torch.save({"ema": {"w": torch.zeros(1)}, "model": {"w": torch.ones(1)}}, tmp_path / "x.pt")
        assert read_checkpoint(tmp_path / "x.pt")["w"] == 0
        assert read_checkpoint(tmp_path / "x.pt", ema=False)["w"] == 1

    def test_safetensors(self, tmp_path, original):
        save_file(original.state_dict(), str(tmp_path / "model.safetensors"))
        self.same(read_checkpoint(tmp_path / "model.safetensors"), original)

    def test_pickle_that_needs_more_is_refused(self, tmp_path):
        torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "model.ckpt")
        with pytest.raises(
            CheckpointError, match=r"holds more than tensors \(argparse.Namespace\).* weights_only=False"
        ):
            read_checkpoint(tmp_path / "model.ckpt")

    def test_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="There is no file .*nowhere.pt"):
            read_checkpoint(tmp_path / "nowhere.pt")

    @pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
    def test_damaged_file(self, tmp_path, name, original):
        if name == "x.pt":
            torch.save(original.state_dict(), tmp_path / name)
        else:
            save_file(original.state_dict(), str(tmp_path / name))
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="cannot be read .* download it again"):
            read_checkpoint(tmp_path / name)

    @pytest.mark.parametrize("content", [{"epoch": 3, "loss": 0.1}, [], 7, {}])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="holds no state dict"):
            read_checkpoint(tmp_path / "x.pt")
