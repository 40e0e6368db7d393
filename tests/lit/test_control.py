"""How a run ends before it is done: by signals, by errors, by other ranks; and what its directory says afterwards."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed

from modiff.errors import ConfigError
from modiff.lit.callbacks import agreement
from modiff.lit.callbacks.progress import Pace
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs import directory
from modiff.lit.runs.control import Control, Stop, controlling, current
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.peers import BEAT_LIMIT, Peers, StoreLost
from modiff.storage.locks import FolderLock

OPTIONS = ("--num_images", "4", "--timing_rounds", "0", "--error_images", "0", "--model.features", "null")


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


def disturbed(monkeypatch, deed) -> None:
    """Do something in the middle of the student's first batch."""
    draw = LitStudent.draw

    def act(self, who, indices):
        if who == "student":
            deed()
        return draw(self, who, indices)

    monkeypatch.setattr(LitStudent, "draw", act)


@pytest.mark.parametrize(
    ("number", "requeue", "code"),
    [(signal.SIGTERM, None, 130), (signal.SIGUSR1, None, 75), (signal.SIGTERM, "1", 75), (signal.SIGINT, "1", 130)],
)
def test_signal_ends_a_run_at_its_next_time_step(modiff, recipe, tmp_path, monkeypatch, number, requeue, code) -> None:
    if requeue:
        monkeypatch.setenv("MODIFF_REQUEUE", requeue)
    with monkeypatch.context() as patch:
        disturbed(patch, lambda: os.kill(os.getpid(), number))
        found, _, err = modiff("evaluate", "--config", recipe, *OPTIONS, "--output", tmp_path / "out")
    assert found == code
    name = signal.Signals(number).name
    assert err == f"modiff evaluate: interrupted by {name}; the same command goes on where this one stopped.\n"
    assert status(tmp_path / "out") == "interrupted"
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("kind", ["disk", "nan", "memory", "bug"])
def test_error_leaves_a_run_marked_as_failed(modiff, recipe, tmp_path, monkeypatch, kind) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        if kind == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
        if kind == "memory":
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        if kind == "nan":
            draw = LitStudent.draw_teacher
            patch.setattr(LitStudent, "draw_teacher", lambda s, i: (draw(s, i)[0] * float("nan"), 0.0))
        else:
            disturbed(patch, fail)
        args = ("evaluate", "--config", recipe, *OPTIONS, "--output", out)
        if kind == "bug":
            with pytest.raises(ZeroDivisionError):
                modiff(*args)
        else:
            code, _, err = modiff(*args)
            said = {
                "disk": "No space left on device",
                "nan": "NaN or Inf in the teacher's images 0 to 3",
                "memory": "By the cost model batch 2 would fit (--data.batch_size 2",
            }
            assert (code, err.count("\n")) == (1, 1)
            assert said[kind] in err
    assert status(out) == "failed"


def test_directory_in_use_is_refused_and_its_holder_named(modiff, recipe, tmp_path) -> None:
    lock = FolderLock(tmp_path / "out", "modiff train").acquire()
    code, said, err = modiff("evaluate", "--config", recipe, *OPTIONS, "--output", tmp_path / "out")
    lock.release()
    assert code == 1
    assert f"is in use: process {os.getpid()} on {socket.gethostname()} (modiff train), since" in err
    assert "waiting for it" in said
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.accelerator", "abacus"), "abacus"),
        (("--trainer.accelerator", "gpu", "--trainer.devices", "3"), "Lightning refuses the trainer's arguments"),
    ],
)
def test_devices_that_are_not_there_are_refused_before_anything_is_written(
    modiff, recipe, tmp_path, options, message
) -> None:
    if torch.cuda.is_available() and "gpu" in options:
        pytest.skip("there are GPUs here")
    code, _, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_requeued_job_goes_on_in_spite_of_overwrite(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def claimed() -> RunDirectory:
        run = RunDirectory(tmp_path / "out", {"command": "evaluate"}, overwrite=True)
        run.claim("x")
        run.mark("interrupted")
        return run

    claimed()
    (tmp_path / "out" / "batch").write_text("drawn")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert claimed().resumed  # the same job, started again
    assert (tmp_path / "out" / "batch").exists()
    claimed()  # the same start of the job, which says it once more
    assert not (tmp_path / "out" / "batch").exists()
    (tmp_path / "out" / "batch").write_text("drawn")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    claimed()  # another job
    assert not (tmp_path / "out" / "batch").exists()


def test_full_disk_does_not_hide_how_a_run_ended(tmp_path, monkeypatch) -> None:
    run = RunDirectory(tmp_path / "out", {"command": "evaluate"})
    run.claim("x")

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run.report(where="images 0 to 3")
    monkeypatch.setattr(directory, "write_json", full)
    run.mark("failed")
    assert status(tmp_path / "out") == "failed"
    assert json.loads((tmp_path / "out" / "status.json").read_text())["status"] == "failed"


@pytest.fixture
def store(monkeypatch):
    """The store of a process group of two."""
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def test_silent_rank_is_lost_after_so_many_looks_whatever_the_clocks_say(store) -> None:
    zero, one = Peers(0, 2), Peers(1, 2)
    for look in range(3 * BEAT_LIMIT):
        one.beat(look, 0, "images 0 to 3")
        assert not zero.neighbor_is_lost()
    assert [zero.neighbor_is_lost() for _ in range(BEAT_LIMIT)] == [False] * (BEAT_LIMIT - 1) + [True]
    assert zero.where(1) == (3 * BEAT_LIMIT - 1, 0, "images 0 to 3")


def test_ranks_agree_on_the_first_word(store) -> None:
    zero, one = Peers(0, 2), Peers(1, 2)
    assert one.read("stop") is None
    assert zero.post("stop", {"why": "a"}) == {"why": "a"}
    assert one.post("stop", {"why": "b"}) == {"why": "a"}
    assert zero.ignorant() == [0, 1]
    one.acknowledge()
    assert zero.ignorant() == [0]


def test_restarted_group_does_not_hear_the_one_before(store, monkeypatch) -> None:
    Peers(0, 2).post("stop", {"why": "a"})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Peers(0, 2).read("stop") is None


def test_store_that_is_gone_is_said(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("modiff.lit.runs.peers.TIMEOUT_S", 1)
    with pytest.raises(StoreLost):
        Peers(0, 2)


def test_stalled_rank_is_the_one_that_got_least_far() -> None:
    control = Control(stall=3)
    control.peers = type(
        "Known",
        (),
        {
            "where": lambda _, rank: [(5, 9, "step 5"), (4, 9, "step 4")][rank],
            "post": lambda _, __, value: value,
        },
    )()
    control._steps, control._still = 5, 3
    control.__class__ = type("Two", (Control,), {"world_size": 2, "rank": 0})
    control._stalled()
    assert control.lost == "Rank 1 has not moved for 3 s; its last step: step 4."


def test_control_belongs_to_one_command() -> None:
    outer = current()
    with controlling() as control:
        assert current() is control is not outer
        control.stop = Stop("a reason")
    assert current() is outer
    assert outer.stop is None


def test_folder_of_one_machine_is_refused_before_anything_is_drawn(tmp_path, monkeypatch) -> None:
    seen = []

    class Group:
        """Two ranks, of which the second one sees nothing."""

        def broadcast_object_list(self, *_, **__) -> None:
            pass

        def barrier(self) -> None:
            seen.extend(path.name for path in tmp_path.iterdir())

        def all_gather_object(self, facts, mine) -> None:
            facts[:] = [(mine[0], "node0"), (False, "node1")]

    monkeypatch.setattr(agreement, "distributed", Group())
    with pytest.raises(ConfigError, match=r"is not shared: rank 1 on node1 does not see what rank 0 on node0 wrote"):
        agreement.refuse_separate_folders(tmp_path, 0, 2)
    assert len(seen) == 1
    assert not list(tmp_path.iterdir())  # the token is gone again
    monkeypatch.setattr(agreement, "TOKEN_WAIT_S", 0.1)
    with pytest.raises(ConfigError, match="is not shared"):
        agreement.refuse_separate_folders(tmp_path / "elsewhere", 1, 2)


def test_finished_quantize_is_not_repeated(modiff, recipe, tmp_path) -> None:
    args = ("quantize", "--config", recipe, "--output", tmp_path / "student")
    assert modiff(*args)[0] == 0
    before = (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns
    code, said, err = modiff(*args)
    assert (code, err) == (0, "")
    assert "holds this very student; nothing to do (--overwrite true repeats it)" in said
    assert (tmp_path / "student" / "model.safetensors").stat().st_mtime_ns == before
    code, _, err = modiff(*args, "--model.config.activation.bits", "5")
    assert code == 1
    assert "holds a checkpoint already" in err


def test_speed_counts_what_was_drawn_alone() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.begin(4, 40, 10)
    assert (pace.images_per_s, pace.seconds_left) == (0.0, None)
    pace.end_batch()  # read from the disk
    now[0] = 5.0
    for _ in range(10):
        pace.call()
    assert pace.seconds_left == 10.0  # two batches of ten calls, half a second each
    assert pace.images_per_s == 2.0
    pace.end_batch()
    assert pace.seconds_left == 10.0


def test_command_without_a_trainer_ends_at_once(modiff, recipe, tmp_path, monkeypatch) -> None:
    from modiff.lit.commands import bench

    monkeypatch.setattr(bench, "measure", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = modiff("bench", recipe, "--batch_sizes", "2", "--output", tmp_path / "out")
    assert code == 130
    assert "modiff bench: interrupted by SIGTERM" in err
    assert status(tmp_path / "out") == "interrupted"
