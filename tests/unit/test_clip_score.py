"""The CLIP score: its arithmetic on a stand-in, and on a tiny random CLIP model where transformers is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.clip import ClipScore


class Prepared(dict):
    def to(self, device: torch.device) -> Prepared:
        return self


class Processor:
    """Means of the channels as pixels, lengths of the words as tokens."""

    def __call__(self, images: list[Tensor], text: list[str], truncation: bool, **_: object) -> Prepared:
        assert truncation
        assert all(image.dtype == torch.uint8 and len(image) == 3 for image in images)
        pixels = torch.stack([image.float().mean(dim=(1, 2)) for image in images])
        tokens = torch.tensor([[float(len(word)) for word in t.split()] for t in text])
        return Prepared(pixels=pixels, tokens=tokens)


class Model(nn.Module):
    def forward(self, pixels: Tensor, tokens: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(image_embeds=5 * pixels, text_embeds=tokens - 3)


@pytest.fixture
def transformers(monkeypatch):
    asked = []

    def loader(result):
        def from_pretrained(name: str, local_files_only: bool):
            asked.append((name, local_files_only))
            if name == "nowhere/clip":
                raise OSError("not in the cache")
            return result

        return types.SimpleNamespace(from_pretrained=from_pretrained)

    module = types.ModuleType("transformers")
    module.CLIPModel, module.CLIPProcessor = loader(Model()), loader(Processor())
    monkeypatch.setitem(sys.modules, "transformers", module)
    return asked


def test_score_is_the_cosine_of_each_pair(transformers):
    score = ClipScore()
    assert score.name == "openai/clip-vit-base-patch16"
    assert transformers == [(score.name, True)] * 2
    images = torch.zeros(3, 3, 4, 4)
    images[0, 0] = images[1, 1] = images[2, 2] = 1.5  # clamped
    # Lengths less 3: (1, 0, 0), (3, 4, 0) and (0, 0, -1): cosines 1, 4/5 and -1, which counts as 0.
    found = score(images, ["long red cat", "abcdef abcdefg abc", "abc abc ab"])
    assert found.tolist() == pytest.approx([100.0, 80.0, 0.0])


def test_grey_images_are_repeated(transformers):
    grey = torch.full((1, 1, 4, 4), 0.5)
    assert (
        ClipScore()(grey, ["long longs red"]).tolist()
        == ClipScore()(grey.expand(-1, 3, -1, -1), ["long longs red"]).tolist()
    )


@pytest.mark.parametrize(("shape", "prompts"), [((2, 4, 8, 8), 2), ((2, 3, 8, 8), 1), ((3, 8, 8), 3)])
def test_other_images_or_numbers_are_refused(transformers, shape, prompts):
    with pytest.raises(ConfigError, match=r"takes images \[N, 1 or 3, H, W\] and N prompts, got .* Give one prompt"):
        ClipScore()(torch.rand(shape), ["a b c"] * prompts)


def test_a_model_that_is_not_here_is_refused_with_the_command(transformers):
    with pytest.raises(CheckpointError, match=r"'nowhere/clip' is neither .* \(not in the cache\). Run: hf down"):
        ClipScore("nowhere/clip")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers, .* Run: pip install 'modiff\[clip\]'"):
        ClipScore()


def tiny_clip(folder: Path) -> Path:
    """A random CLIP model with its tokenizer of single letters."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    text = {**size, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 16, "patch_size": 4}, projection_dim=8
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_a_real_clip_model(tmp_path):
    """Equal to the features of the model's two halves, whatever the batch; a long prompt is cut."""
    score = ClipScore(str(tiny_clip(tmp_path)))
    images, prompts = torch.rand(3, 3, 20, 20), ["a cat", "two dogs", "a very long text about nothing"]
    found = score(images, prompts)
    assert found.shape == (3,)
    assert found.max() > 0
    assert all(0 <= value <= 100 for value in found.tolist())
    for i in range(3):
        inputs = score.processor(
            images=[(images[i] * 255).round().byte()], text=prompts[i], return_tensors="pt", truncation=True
        )
        assert inputs["input_ids"].shape[1] <= 8
        with torch.no_grad():
            logit = score.network(**inputs).logits_per_image / score.network.logit_scale.exp()
        assert found[i].item() == pytest.approx(max(100 * float(logit), 0), abs=1e-4)
