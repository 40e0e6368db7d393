"""Errors between a student's and a teacher's images of the same noise."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import nn

from modiff.errors import CheckpointError, ConfigError
from modiff.metrics.pairwise import PerceptualDistance, finite_mean, mean_psnr_db, psnr_db, relative_l2, ssim


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(4, 3, 16, 20, generator=generator)
    return (teacher + 0.1 * torch.randn(teacher.shape, generator=generator)).clamp(0, 1), teacher


def test_psnr_of_a_known_error():
    teacher = torch.full((2, 1, 4, 4), 0.5)
    student = teacher + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr_db(student, teacher).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert mean_psnr_db(student, teacher) == pytest.approx(30.0, abs=1e-4)


def test_psnr_is_per_image_and_then_averaged(pair):
    student, teacher = (x.double().numpy() for x in pair)
    expected = [10 * math.log10(1 / ((s - t) ** 2).mean()) for s, t in zip(student, teacher, strict=True)]
    assert psnr_db(*pair).tolist() == pytest.approx(expected, abs=1e-9)
    assert mean_psnr_db(*pair) == pytest.approx(sum(expected) / 4, abs=1e-9)


def test_psnr_clamps_both_images():
    assert psnr_db(torch.full((1, 1, 2, 2), 5.0), torch.full((1, 1, 2, 2), 1.2)).item() == math.inf
    assert psnr_db(torch.full((1, 1, 2, 2), -3.0), torch.full((1, 1, 2, 2), 0.1)).item() == pytest.approx(20, abs=1e-4)


def test_identical_images_give_null(pair):
    student, teacher = pair
    assert mean_psnr_db(teacher, teacher) is None
    student[0] = teacher[0]
    assert psnr_db(student, teacher)[0] == math.inf
    assert mean_psnr_db(student, teacher) == pytest.approx(psnr_db(student, teacher)[1:].mean().item())


def test_nan_shows_in_the_mean():
    assert math.isnan(finite_mean(torch.tensor([20.0, math.nan, math.inf])))
    assert finite_mean(torch.tensor([math.inf])) is None
    broken = torch.full((1, 1, 2, 2), math.nan)
    assert math.isnan(mean_psnr_db(broken, torch.zeros(1, 1, 2, 2)))


def test_relative_l2_is_in_the_models_own_range():
    teacher = torch.tensor([[[3.0, -4.0]], [[0.0, 10.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    student = torch.tensor([[[3.0, -3.0]], [[-20.0, 10.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    assert relative_l2(student, teacher).tolist() == pytest.approx([0.2, 2.0, 0.0, math.inf])


def test_ssim_equals_scipy(pair):
    """Gaussian window of 11 with sigma 1.5, K1 = .01, K2 = .03, the border reflected."""

    def blur(x: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(x, 1.5, radius=5, mode="mirror")

    def channel(s: np.ndarray, t: np.ndarray) -> float:
        ms, mt = blur(s), blur(t)
        vs, vt, covariance = blur(s * s) - ms**2, blur(t * t) - mt**2, blur(s * t) - ms * mt
        c1, c2 = 0.01**2, 0.03**2
        values = (2 * ms * mt + c1) * (2 * covariance + c2) / ((ms**2 + mt**2 + c1) * (vs + vt + c2))
        return float(values.mean())

    student, teacher = (x.double().numpy() for x in pair)
    expected = [np.mean([channel(*c) for c in zip(s, t, strict=True)]) for s, t in zip(student, teacher, strict=True)]
    assert ssim(*pair).tolist() == pytest.approx(expected, abs=1e-5)  # float32
    assert ssim(pair[1], pair[1]).tolist() == pytest.approx([1.0] * 4)
    assert ssim(pair[0][:1] + 7, pair[1][:1]).shape == (1,)
    assert torch.equal(ssim(pair[0] + 7, pair[1]), ssim(torch.ones_like(pair[0]), pair[1]))


def test_small_images_have_no_ssim():
    with pytest.raises(ConfigError, match=r"at least 11x11, got \[2, 1, 10, 16\]"):
        ssim(torch.rand(2, 1, 10, 16), torch.rand(2, 1, 10, 16))


@pytest.mark.parametrize("measure", [psnr_db, mean_psnr_db, relative_l2, ssim])
def test_other_shapes_are_refused(measure):
    with pytest.raises(ConfigError, match=r"Student \[2, 1, 16, 16\] and teacher \[3, 1, 16, 16\] must have the same"):
        measure(torch.rand(2, 1, 16, 16), torch.rand(3, 1, 16, 16))


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    """What is used of torchvision, which the tests do without; its cache is an empty folder."""
    models = types.ModuleType("torchvision.models")
    models.get_model_weights = lambda name: types.SimpleNamespace(
        DEFAULT=types.SimpleNamespace(url=f"https://where/{name}-abc.pth")
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def fake_lpips(monkeypatch, torchvision):
    """torchmetrics' metric without torchvision: its network returns the mean squared difference in [-1, 1]."""

    class Network(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, normalize: bool) -> torch.Tensor:
            assert normalize
            assert a.shape[1] == b.shape[1] == 3
            return (2 * a - 2 * b).square().mean(dim=(1, 2, 3), keepdim=True)

    def build(net_type: str, normalize: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(net=Network())

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", build)
    (torchvision / "squeezenet1_1-abc.pth").touch()


@pytest.mark.usefixtures("fake_lpips")
def test_lpips_is_per_image_and_takes_grey_ones():
    distance = PerceptualDistance("squeeze")
    teacher = torch.zeros(2, 1, 8, 8)
    student = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1).expand_as(teacher)
    assert distance(student, teacher).tolist() == pytest.approx([1.0, 4.0])
    assert distance(student[:1], teacher[:1]).shape == (1,)
    assert distance.name == "lpips-squeeze"
    with pytest.raises(ConfigError, match=r"\[N, 1 or 3, H, W\], got \[2, 4, 8, 8\]"):
        distance(torch.rand(2, 4, 8, 8), torch.rand(2, 4, 8, 8))


def test_lpips_without_torchvision_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ConfigError, match=r"LPIPS needs torchvision, which is not .*pip install 'modiff\[lpips\]'"):
        PerceptualDistance()


@pytest.mark.usefixtures("torchvision")
def test_lpips_without_weights_says_how_to_get_them():
    with pytest.raises(CheckpointError, match=r"'alex' are not in .*checkpoints. Run once.*models.alexnet\(weights="):
        PerceptualDistance()


def test_unknown_lpips_network_is_refused():
    with pytest.raises(ConfigError, match="alex, vgg or squeeze; got 'dino'"):
        PerceptualDistance("dino")


def test_metrics_import_neither_lightning_nor_optional_extras():
    import subprocess

    code = (
        "import sys, modiff.metrics.fidelity, modiff.metrics.pairwise;"
        "print([m for m in ('lightning', 'torch_fidelity', 'torchvision', 'diffusers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
