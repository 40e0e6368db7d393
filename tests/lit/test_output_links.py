"""``--overwrite`` on an output that is a symbolic link replaces what lies behind it."""

from __future__ import annotations

import json

import torch

import modiff as library


def test_a_run_behind_a_link_is_replaced(modiff, recipe, tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    for seed in ("0", "1"):
        options = ["--num_images", "2", "--model.steps", "2", "--seed", seed, "--overwrite", "true"]
        status, _, err = modiff("sample", "--config", recipe, *options, "--output", tmp_path / "link")
        assert status == 0, err
    assert (tmp_path / "link").is_symlink()
    run = json.loads((tmp_path / "disk" / "run.json").read_text())
    assert (run["status"], run["identity"]["seed"]) == ("complete", 1)


def test_a_student_behind_a_link_is_replaced(tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    for name in ("w8a8-ptq", "w4a8-ptq"):
        student = library.quantize(torch.nn.Sequential(torch.nn.Linear(4, 4)), name)
        library.save(student, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["quant_config"]["weight"]["bits"] == 4
