"""Files named like checkpoints are called what they are; state dicts are found under the wrappers that people use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modiff.errors import CheckpointError
from modiff.teachers.convert.checkpoints import read_checkpoint

STATE = {"conv_in.weight": torch.ones(2), "out.bias": torch.zeros(1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, such as a login or an error"),
        (b"\n  <html></html>", "is a web page"),
        (b'{"error": "not found"}', "is a JSON file. Give the file with the weights"),
        (b"", "is empty. Download it again"),
    ],
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_files_of_another_kind(tmp_path, content, message, name) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors"])
def test_a_pointer_in_the_place_of_safetensors(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="is a git-lfs pointer"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "ema_model.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"module": s},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"lr": 1}},
        lambda s: {"ema": s, "model": {"other": torch.ones(1)}},
        lambda s: {"module": {"state_dict": s}},
        lambda s: {**s, "n_averaged": torch.tensor(5)},
    ],
)
def test_wrappers_and_prefixes(tmp_path, prefix, wrap) -> None:
    torch.save(wrap({f"{prefix}{k}": v for k, v in STATE.items()}), tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[k], v) for k, v in STATE.items())


def test_an_averaged_model_of_pytorch(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").keys() == model.state_dict().keys()


def test_the_prefix_of_compvis_stays(tmp_path) -> None:
    torch.save({f"model.diffusion_model.{k}": v for k, v in STATE.items()}, tmp_path / "x.ckpt")
    assert list(read_checkpoint(tmp_path / "x.ckpt")) == [f"model.diffusion_model.{k}" for k in STATE]


def test_ema_or_not(tmp_path) -> None:
    torch.save({"ema": STATE, "model": {"a": torch.ones(1)}}, tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").keys() == STATE.keys()
    assert list(read_checkpoint(tmp_path / "x.pt", ema=False)) == ["a"]
