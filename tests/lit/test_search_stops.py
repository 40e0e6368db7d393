"""A search stops at a time step as other commands do, goes on, and deletes nothing that another process works on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from modiff.lit.search import target
from modiff.lit.search.target import TeacherTarget
from modiff.storage.locks import FolderLock


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


@pytest.fixture
def args(tiny_teacher, tmp_path) -> list[str]:
    """Three settings of 2 and 3 steps, 2 images each; the reference takes 8 and 4 steps."""
    found = ["search", "--teacher.path", str(tiny_teacher), "--output", str(tmp_path / "out")]
    found += ["--quality", "relative_l2 <= 9", "--space.samplers", "[ddim]", "--space.steps", "[2,3]"]
    found += ["--space.activation_bits", "[8]", "--space.schedules", "[none]", "--images", "2", "--confirm_images"]
    found += ["2", "--batch_size", "2", "--reference_sampler", "ddim", "--reference_steps", "8", "--budget", "5m"]
    return [*found, "--wandb", "disabled"]


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The settings that were measured, in order."""
    found: list[str] = []
    measure = TeacherTarget.measure

    def kept(self, setting, count):
        result = measure(self, setting, count)
        found.append(str(setting))
        return result

    monkeypatch.setattr(TeacherTarget, "measure", kept)
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGUSR1, 75)])
def test_signal_stops_a_search_at_a_time_step_and_it_goes_on(modiff, args, measured, monkeypatch, number, code) -> None:
    seen: list[int] = []
    sample = target.sample

    def disturbed(denoiser, scheduler, noise, steps, **options):
        def counted(x: torch.Tensor, t):
            seen.append(steps)
            if steps == 3 and seen.count(3) == 2:
                os.kill(os.getpid(), number)  # in the second evaluation of a setting of three steps
            return denoiser(x, t)

        return sample(counted, scheduler, noise, steps, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, "sample", disturbed)
        found, said, err = modiff(*args)
    out = Path(args[args.index("--output") + 1])
    assert (found, status(out)) == (code, "interrupted")
    assert err == f"modiff search: interrupted by {number.name}; the same command goes on where this one stopped.\n"
    assert seen[-1] == 3  # the third evaluation was not begun
    assert seen.count(3) == 2
    before = list(measured)
    found, said, err = modiff(*args)
    assert (found, status(out)) == (0, "complete"), err
    assert not set(before) & set(measured[len(before) :])
    assert (out / "frontier.json").is_file()
    assert list((out / ".workers").iterdir()) == []


def test_search_of_another_process_is_not_deleted(modiff, args) -> None:
    out = Path(args[args.index("--output") + 1])
    with FolderLock(out / ".workers" / "node1-7", "modiff search"):
        found, _, err = modiff(*args, "--overwrite", "true")
        assert found == 1
        assert f"is in use: process {os.getpid()} on" in err
        assert "(modiff search), since" in err
        assert "leave --overwrite out" in err
        assert (out / ".workers" / "node1-7").is_dir()
        assert modiff(*args)[0] == 0  # without it they share the work
        assert status(out) == "running"  # as the other one is
    assert modiff(*args, "--overwrite", "true")[0] == 0  # a lock dies with its process
    assert status(out) == "complete"
