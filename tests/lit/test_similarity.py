"""SSIM, LPIPS and CLIP scores in metrics.json: measured where they can be, else absent with the reason."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import Tensor, nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.figures import ImagePairs, Setting
from modiff.metrics.pairwise import ssim
from modiff.metrics.pixel_figures import PromptSimilarity, StructuralSimilarity

PROMPTS = ["a cat", "two dogs", "three"]
TINY = """
num_images: 3
wandb: disabled
timing_rounds: 0
error_images: 0
model: {teacher: {name: %s, tiny: true}, steps: 2, preset: w8a4-modiff, features: null}
data: {batch_size: 2%s}
trainer: {accelerator: cpu, enable_progress_bar: false}
"""


class Words(nn.Module):
    """A CLIP score: the number of letters."""

    def __init__(self, name: str = "clip") -> None:
        super().__init__()
        if name == "nowhere":
            raise CheckpointError("CLIP model 'nowhere' is not here.")
        self.name = name

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert len(images) == len(prompts)
        return torch.tensor([float(len(text)) for text in prompts])


class Distance(nn.Module):
    name = "lpips-alex"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[-1] < 16:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return (student - teacher).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def extras(monkeypatch) -> None:
    monkeypatch.setattr("modiff.metrics.pixel_figures.ClipScore", Words)
    monkeypatch.setattr("modiff.metrics.pixel_figures.PerceptualDistance", Distance)


@pytest.fixture
def evaluate(tmp_path, modiff):
    def run(teacher: str, prompted: bool, *options: str):
        (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(TINY % (teacher, f", prompts: {tmp_path / 'p.txt'}" if prompted else ""))
        status, _, err = modiff("evaluate", "--config", recipe, "--output", tmp_path / "out", *options)
        assert status == 0, err
        page = (tmp_path / "out" / "report.html").read_text()
        return json.loads((tmp_path / "out" / "metrics.json").read_text()), page

    return run


@pytest.mark.usefixtures("extras")
def test_prompted_images_have_all_three(evaluate) -> None:
    metrics, page = evaluate("sd-v1-4", True)
    student, teacher = metrics["student"], metrics["teacher"]
    assert 0 < student["ssim"] < 1
    assert student["lpips"] > 0
    letters = sum(map(len, PROMPTS)) / 3  # the fourth image of the last batch does not count
    assert (student["clip_score"], teacher["clip_score"]) == pytest.approx((letters, letters))
    assert (metrics["features"]["lpips"], metrics["features"]["clip"]) == ("lpips-alex", "openai/clip-vit-base-patch16")
    assert not {"student.ssim", "student.lpips", "student.clip_score"} & set(metrics["reasons"])
    names = "lpips-alex", metrics["features"]["clip"]
    for shown in ("LPIPS to the teacher&#39;s images", "CLIP score, 0 to 100", *names):
        assert shown in page


def test_without_the_extras_their_keys_are_absent_with_the_reason(evaluate, monkeypatch) -> None:
    for name in ("transformers", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    metrics, page = evaluate("sd-v1-4", True)
    assert "ssim" in metrics["student"]
    assert not {"lpips", "clip_score"} & (set(metrics["student"]) | set(metrics["teacher"]))
    assert "pip install 'modiff[lpips]'" in metrics["reasons"]["student.lpips"]
    for who in ("teacher", "student"):
        assert "pip install 'modiff[clip]'" in metrics["reasons"][f"{who}.clip_score"]
    assert "SSIM to the teacher" in page
    assert "LPIPS to the teacher&#39;s images (student), not available: LPIPS needs torchvision" in page


@pytest.mark.usefixtures("extras")
def test_a_tiny_model_without_prompts_has_no_clip_score(evaluate) -> None:
    metrics, _ = evaluate("sd-v1-4", False)
    assert metrics["reasons"]["student.clip_score"] == "data gives no prompts"
    assert "clip_score" not in metrics["student"]


@pytest.mark.usefixtures("extras")
def test_small_images_and_teachers_without_prompts_say_so(evaluate) -> None:
    metrics, _ = evaluate("ddpm-cifar10", False)
    assert metrics["reasons"]["teacher.clip_score"] == "this teacher draws without prompts"
    assert metrics["reasons"]["student.ssim"] == "it needs images of at least 11x11 pixels"
    assert metrics["reasons"]["student.lpips"] == "lpips-alex takes no images of 8x8 pixels and 3 channels"
    assert not {"ssim", "lpips", "clip_score"} & set(metrics["student"])


@pytest.mark.usefixtures("extras")
def test_a_clip_model_that_is_asked_for_must_be_there() -> None:
    assert PromptSimilarity(Setting((3, 16, 16), prompted=True, clip="mine")).network.name == "mine"
    with pytest.raises(CheckpointError, match="'nowhere' is not here"):
        PromptSimilarity(Setting((3, 16, 16), prompted=True, clip="nowhere"))
    with pytest.raises(ConfigError, match="model.clip is 'mine', but this teacher draws without prompts. Remove it"):
        PromptSimilarity(Setting((3, 16, 16), clip="mine"))


@pytest.mark.usefixtures("extras")
def test_batches_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.rand(2, 5, 3, 16, 16, generator=generator)
    found = []
    for size in (5, 2):
        values = {}
        setting = Setting((3, 16, 16), prompted=True)
        for measure in (PromptSimilarity(setting), StructuralSimilarity(setting)):
            for index in torch.arange(5).split(size):
                s, t = student[index], teacher[index]
                measure.update(ImagePairs(t, s, t, s, index, ["abcde"[i] for i in index]))
            values |= measure.compute().values
        found.append(values)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0]["student.ssim"] == pytest.approx(float(ssim(student, teacher).mean()), abs=1e-6)
