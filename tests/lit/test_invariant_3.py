"""Invariant 3: the image of index i depends on (seed, i, config, batch size) only, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modiff.config.quant import QuantConfig
from modiff.config.schedule import ReuseSchedule
from modiff.lit.data.noise import NoiseDataModule
from modiff.lit.modules.student import LitStudent
from modiff.teachers.sampling.noise import indexed_noise
from modiff.teachers.zoo import TeacherSpec
from modiff.trajectory.session import trajectory
from tests.fault_cases import ROOT, free_port


def images(
    teacher: Path, num_images: int, batch_size: int, world_size: int = 1, dtype: torch.dtype = torch.float32, **options
) -> torch.Tensor:
    """The student's images 0 .. num_images - 1, as the ranks of a run draw them."""
    given = {"preset": "w8a4-modiff-paper", "steps": 3, **options}
    module = LitStudent(TeacherSpec(path=str(teacher)), **given)
    module.prepare(seed=7)
    module.student.to(dtype)
    noise = module.noise
    module.noise = lambda *args, **kwargs: noise(*args, **kwargs).to(dtype)
    found = {}
    for rank in range(world_size):
        for batch in NoiseDataModule(batch_size, num_images).batches(world_size, rank):
            with trajectory(module.student):
                drawn = module.denoise(module.student, batch["index"])
            for i, image, keep in zip(batch["index"].tolist(), drawn, batch["valid"].tolist(), strict=True):
                if keep:
                    assert i not in found
                    found[i] = image
    assert sorted(found) == list(range(num_images))
    return torch.stack([found[i] for i in range(num_images)])


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_invariant_3_images_do_not_depend_on_their_number_or_on_the_ranks(tiny_teacher, eta) -> None:
    whole = images(tiny_teacher, 7, 3, eta=eta)
    assert torch.equal(images(tiny_teacher, 2, 3, eta=eta), whole[:2])
    assert torch.equal(images(tiny_teacher, 7, 3, world_size=2, eta=eta), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_invariant_3_batch_sizes_agree_up_to_rounding(tiny_teacher, eta) -> None:
    # In float64: a float32 difference of 1e-7 may move a 4-bit code, whose error the next evaluation feeds back, so the
    # bound on float32 images would depend on the number of threads.
    a, b = (images(tiny_teacher, 4, size, dtype=torch.float64, eta=eta) for size in (4, 1))
    assert torch.allclose(a, b, atol=1e-6)


def skipping(preset: str) -> QuantConfig:
    config = QuantConfig.preset("w8a4-modiff-paper")
    return dataclasses.replace(config, schedule=ReuseSchedule.preset(preset))


@pytest.mark.parametrize("schedule", ["reuse-2", "extrapolate-2"])
def test_invariant_3_holds_where_blocks_are_reused(tiny_teacher, schedule) -> None:
    given = {"preset": None, "config": skipping(schedule), "steps": 5}
    whole = images(tiny_teacher, 7, 3, **given)
    assert torch.equal(images(tiny_teacher, 2, 3, **given), whole[:2])
    assert torch.equal(images(tiny_teacher, 7, 3, world_size=2, **given), whole)
    assert not torch.equal(images(tiny_teacher, 7, 3, steps=5), whole), "blocks were skipped"
    a, b = (images(tiny_teacher, 4, size, dtype=torch.float64, **given) for size in (4, 1))
    assert torch.allclose(a, b, atol=1e-6)


def test_invariant_3_step_noise_matters_and_is_seeded(tiny_teacher) -> None:
    quiet, noisy = images(tiny_teacher, 2, 2), images(tiny_teacher, 2, 2, eta=0.7)
    assert not torch.allclose(quiet, noisy, atol=0.1)


def test_every_rank_gets_equally_many_whole_batches() -> None:
    for num_images in (1, 4, 9):
        ranks = [NoiseDataModule(4, num_images).batches(2, rank) for rank in range(2)]
        assert len(ranks[0]) == len(ranks[1])
        index = torch.cat([b["index"] for batches in ranks for b in batches])
        valid = torch.cat([b["valid"] for batches in ranks for b in batches])
        assert all(len(b["index"]) == 4 for batches in ranks for b in batches)
        assert sorted(index[valid].tolist()) == list(range(num_images))


def test_seeds_indices_and_streams_do_not_collide() -> None:
    def draw(seed, index, stream=0):
        return indexed_noise(seed, [index], (4,), stream)

    cases = [(0, 0), (1, 0), (0, 1), (2**32, 0), (0, 2**32), (2**32 + 1, 0), (0, 0, 1), (0, 0, 2), (1, 1), (0, 2**63)]
    drawn = [tuple(draw(*case).flatten().tolist()) for case in cases]
    assert len(set(drawn)) == len(cases)
    # What this is for: the generator of PyTorch's CPU forgets all but 32 bits.
    forgetful = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2**32)]
    assert torch.equal(*forgetful)


def test_noise_is_standard_normal_and_rows_are_their_own() -> None:
    noise = indexed_noise(3, range(200), (1, 8, 8))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert torch.equal(indexed_noise(3, [5], (1, 8, 8))[0], noise[5])


def test_streams_of_a_long_image_do_not_overlap() -> None:
    """The counter's highest word is the stream, so no image is large enough to run into the next one."""
    first, second = indexed_noise(0, [0], (1 << 16,)), indexed_noise(0, [0], (1 << 16,), stream=1)
    assert not set(first[0, -64:].tolist()) & set(second[0, :64].tolist())


ITSELF = [sys.executable, "-m", "modiff.lit.cli.main"]


def check_two_processes(recipe: Path, folder: Path, program: list[str], more: list[str]) -> None:
    """Every image and every figure of two processes is that of one, bit for bit."""
    real = folder / "real"
    real.mkdir()
    for i, picture in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)):
        Image.fromarray(picture).save(real / f"{i:02d}.png")
    base = ["evaluate", "--config", str(recipe), "--timing_rounds", "0", "--model.reference", str(real)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    jobs = {
        name: subprocess.Popen(
            [*start, *base, *options, "--output", str(folder / name)],
            env={**environment, "MODIFF_CACHE": str(folder / f"cache-{name}")},  # each measures the real images
        )
        for name, start, options in (("one", ITSELF, []), ("two", program, more))
    }
    assert {name: job.wait(timeout=400) for name, job in jobs.items()} == {"one": 0, "two": 0}
    one, two = folder / "one", folder / "two"
    assert (one / "samples.safetensors").read_bytes() == (two / "samples.safetensors").read_bytes()
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert (a["provenance"]["world_size"], b["provenance"]["world_size"]) == (1, 2)
    # Every figure, bit for bit: sums do not depend on who drew what.
    for part in ("cost", "evaluations", "teacher", "student", "features", "reasons"):
        assert a[part] == b[part]
    for who, key in itertools.product(("teacher", "student"), ("fid", "precision", "recall", "inception_score")):
        assert a[who][key] is not None
    assert a["student"]["fid_to_teacher"] > 0


def test_invariant_3_two_processes_draw_the_images_of_one(recipe, tmp_path) -> None:
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    check_two_processes(recipe, tmp_path, ITSELF, two)


@pytest.mark.slow
def test_invariant_3_fabric_run_draws_the_images_of_one_process(recipe, tmp_path) -> None:
    """The recipe leaves the devices open, so that the launcher's number is taken."""
    fabric = [str(Path(sys.executable).with_name("fabric")), "run", "--devices", "2", "--accelerator", "cpu"]
    check_two_processes(recipe, tmp_path, [*fabric, "--main-port", str(free_port()), str(ROOT / "recipes/run.py")], [])


def test_config_is_kept_as_given() -> None:
    assert LitStudent(preset="w8a4-modiff-paper").config == QuantConfig.preset("w8a4-modiff-paper")
