"""The UNet on patches of pixels: a denoiser like any other."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

import modiff
from modiff.calibration import CalibrationSettings, calibrate
from modiff.errors import CheckpointError, ConfigError
from modiff.lit.modules.teacher import TRAINING_STREAM, LitTeacher
from modiff.teachers.patched import PatchedUNet2DModel, make_denoiser
from modiff.teachers.sampling.loop import sample
from modiff.teachers.sampling.noise import indexed_integers, indexed_noise
from modiff.teachers.sampling.schedulers import make_scheduler
from modiff.teachers.zoo import TeacherSpec, load_teacher

TINY = {
    "patch_size": 2,
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def patched():
    torch.manual_seed(0)
    return PatchedUNet2DModel(**TINY).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path):
    patched().save_pretrained(tmp_path / "teacher" / "unet")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "teacher" / "scheduler")
    return tmp_path / "teacher"


def test_it_is_its_base_class_on_patches():
    model, x = patched(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inner = UNet2DModel(
        **{k: v for k, v in TINY.items() if k != "patch_size"}
        | {"sample_size": 4, "in_channels": 12, "out_channels": 12}
    ).eval()
    inner.load_state_dict(model.state_dict())
    expected = nn.functional.pixel_shuffle(inner(nn.functional.pixel_unshuffle(x, 2), 7).sample, 2)
    assert torch.equal(model(x, 7).sample, expected)
    assert torch.equal(model(x, 7, return_dict=False)[0], expected)
    assert (model.config.in_channels, model.config.out_channels, model.config.sample_size) == (3, 3, 8)


def test_it_is_loaded_by_the_name_of_its_class(folder):
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "PatchedUNet2DModel"
    teacher = load_teacher(TeacherSpec(path=str(folder)))
    assert type(teacher.denoiser) is PatchedUNet2DModel
    assert teacher.sample_shape == (3, 8, 8)
    for name, tensor in patched().state_dict().items():
        assert torch.equal(teacher.denoiser.state_dict()[name], tensor)


def test_a_trained_one_is_exported_and_loaded(tmp_path):
    module = LitTeacher(denoiser=TINY, schedule={"clip_sample": False})
    module.export(tmp_path / "export")
    teacher = load_teacher(TeacherSpec(path=str(tmp_path / "export")))
    assert type(teacher.denoiser) is PatchedUNet2DModel
    assert torch.equal(teacher.denoiser.conv_in.weight, module.denoiser.conv_in.weight)
    assert teacher.scheduler_config["clip_sample"] is False


def test_it_is_quantized_calibrated_and_saved_like_any_other(folder, tmp_path):
    teacher = load_teacher(TeacherSpec(path=str(folder)))
    scheduler, noise = make_scheduler("ddim", teacher.scheduler_config), torch.randn(2, 3, 8, 8)

    def run(student):
        with modiff.trajectory(student):
            return sample(student, scheduler, noise, 3)

    settings = CalibrationSettings(positions=64, tuning_iterations=2)
    student = calibrate(teacher.denoiser, modiff.QuantConfig.preset("w4a4-modiff"), run, "gptq", settings=settings)
    rows = {row.name: row for row in modiff.describe(student)}
    assert [rows[name].special for name in ("conv_in", "time_embedding.linear_1", "conv_out")] == [
        "end",
        "vector",
        "end",
    ]
    assert rows["down_blocks.0.resnets.0.conv1"].activation.scales == "power_of_two"
    images = run(student)
    cost = modiff.cost(student, noise, torch.tensor(1))
    assert cost.gbops_per_evaluation < cost.container_gbops_per_evaluation
    modiff.save(student, tmp_path / "s")
    assert torch.equal(run(modiff.load(tmp_path / "s", load_teacher(TeacherSpec(path=str(folder))).denoiser)), images)


def test_training_starts_from_a_folder(folder):
    module = LitTeacher(denoiser=TINY, init_from=str(folder / "unet"))
    assert torch.equal(module.denoiser.conv_in.weight, patched().conv_in.weight)
    with pytest.raises(
        CheckpointError, match=r"init_from '.*' holds no weights for this denoiser \(.*\). Give the unet/"
    ):
        LitTeacher(denoiser={**TINY, "block_out_channels": [8, 8]}, init_from=str(folder / "unet"))
    with pytest.raises(CheckpointError, match="init_from"):
        LitTeacher(denoiser=TINY, init_from=str(folder / "nowhere"))


def test_min_snr_weights_the_loss_in_training_only():
    module = LitTeacher(denoiser=TINY, snr_gamma=0.05)
    images, numbers = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    plain = LitTeacher(denoiser=TINY)
    plain.load_state_dict(module.state_dict())
    losses = {}
    for name, model in (("weighted", module), ("plain", plain)):
        for training in (True, False):
            with torch.no_grad():
                losses[name, training] = model.train(training).loss(images, numbers).item()
    assert losses["weighted", False] == losses["plain", False]
    noise = indexed_noise(module.random_seed, range(4), (3, 8, 8), TRAINING_STREAM)
    timestep = indexed_integers(module.random_seed, range(4), 1000, stream=TRAINING_STREAM + 1)[:, 0]
    signal = plain.scheduler.alphas_cumprod[timestep].double()
    with torch.no_grad():
        noisy = plain.scheduler.add_noise(images * 2 - 1, noise, timestep)
        errors = (plain.denoiser(noisy, timestep).sample - noise).double().square().mean((1, 2, 3))
    snr = signal / (1 - signal)
    expected = (errors * torch.minimum(snr, torch.tensor(0.05)) / snr).mean().item()
    assert losses["weighted", True] == pytest.approx(expected, rel=1e-4)
    assert losses["weighted", True] < losses["plain", True]


def test_a_constant_rate_rises_and_stays():
    module = LitTeacher(denoiser=TINY, decay="none", warmup_steps=10, learning_rate=1.0)
    found = module.configure_optimizers()
    rates = [found["lr_scheduler"]["scheduler"].lr_lambdas[0](step) for step in (0, 4, 9, 10, 10**6)]
    assert rates == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_wrong_fields_are_refused():
    with pytest.raises(ConfigError, match="patch_size is 3, but the images are 8 pixels wide. Give a divisor"):
        make_denoiser({**TINY, "patch_size": 3})
    with pytest.raises(ConfigError, match="snr_gamma is 0; allowed are numbers above 0, or null"):
        LitTeacher(denoiser=TINY, snr_gamma=0)
