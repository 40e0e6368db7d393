"""A signal counts while there is work: before it the process leaves at once, after it the exit code stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from modiff.lit.cli.main import main
from modiff.lit.runs.control import LAUNCHER_PID, Control, Interrupted, Stop, controlling, parent_process
from modiff.lit.runs.directory import RunDirectory

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

AFTER = """
import atexit, os, signal, sys, types
from modiff.errors import ConfigError
from modiff.lit.cli.main import COMMANDS, main
from modiff.lit.runs.control import Interrupted, Stop


def goodbye():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
    print("still here", flush=True)


def tiny(args):
    print("done", flush=True)
    if args:
        raise {"refused": ConfigError("no"), "stopped": Interrupted(Stop("a reason", True))}[args[0]]
    return 0


sys.modules["tiny_command"] = types.SimpleNamespace(tiny=tiny)
COMMANDS["tiny"] = ("tiny_command", "")
import modiff.lit.runs.endings  # once for all of them
for arguments in (["--version"], ["nonsense"], ["tiny", "refused"], ["tiny", "stopped"]):
    child = os.fork()
    sys.argv = ["modiff", *arguments]
    if child == 0:
        code = main()
        goodbye()
        os._exit(code)  # taking a forked interpreter apart takes long
    print(*arguments, "->", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
atexit.register(goodbye)  # the interpreter calls it on its way out, long after the command
sys.argv = ["modiff", "tiny"]
sys.exit(main())
"""

BEFORE = """
import os, signal, sys
from modiff.lit.cli.main import main


class Disturb:
    def find_spec(self, name, *_):
        if name == "modiff.lit.runs.endings":  # what the command imports first
            os.kill(os.getpid(), number)


sys.meta_path.insert(0, Disturb())
sys.argv = ["modiff", "evaluate"]
for number, requeue in (
    (signal.SIGTERM, ""), (signal.SIGTERM, "1"), (signal.SIGUSR1, ""), (signal.SIGINT, "1")
):
    child = os.fork()
    if child == 0:
        os.environ["MODIFF_REQUEUE"] = requeue
        os._exit(main())
    print(number.name, requeue, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=known, check=False)


def test_signal_after_the_command_does_not_change_its_exit_code() -> None:
    found = python(AFTER)
    codes = [line for line in found.stdout.splitlines() if "->" in line]
    expected = ["--version -> 0", "nonsense -> 2", "tiny refused -> 1", "tiny stopped -> 75"]
    assert codes == expected, found.stdout + found.stderr
    assert found.returncode == 0
    assert found.stdout.count("still here") == len(expected) + 1


def test_signal_during_imports_ends_the_command_with_its_exit_code() -> None:
    found = python(BEFORE)
    assert found.stdout.splitlines() == ["SIGTERM  130", "SIGTERM 1 75", "SIGUSR1  75", "SIGINT 1 130"]
    assert found.stderr.splitlines() == [
        f"modiff evaluate: interrupted by {name} before it began; the same command goes on."
        for name in ("SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT")
    ]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_after_the_work_is_over_is_ignored(tmp_path, number) -> None:
    run = RunDirectory(tmp_path / "out", {"command": "evaluate"})
    with controlling() as control:
        with control.deferring(), control.marking(run):
            run.claim("x")
            run.mark("complete")
        os.kill(os.getpid(), number)  # here the metrics are printed, and the ranks take leave
        assert control.stop is None
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "complete"


def test_complete_run_is_never_marked_as_interrupted(tmp_path) -> None:
    run = RunDirectory(tmp_path / "out", {"command": "evaluate"})

    def work(control: Control) -> None:
        with control.deferring(), control.marking(run):
            run.claim("x")
            run.mark("complete")
            os.kill(os.getpid(), signal.SIGTERM)  # before the first step it ends the work at once

    with controlling() as control, pytest.raises(Interrupted):
        work(control)
    assert run.status == "complete"


def test_second_work_of_a_command_can_be_interrupted_again(tmp_path) -> None:
    with controlling() as control:
        for name in ("first", "second"):
            run = RunDirectory(tmp_path / name, {"command": "evaluate"})
            with control.marking(run):
                run.claim("x")
                assert not control.over
                run.mark("complete")
            assert control.over


def test_library_use_gets_its_handlers_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert main(["nonsense"]) == 2
    assert main(["statistics", "--help-me"]) == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("code", "stop"), [(130, False), (75, True)])
def test_rank_that_was_stopped_while_it_imported_stops_the_others(code, stop) -> None:
    control = Control()
    ended = types.SimpleNamespace(poll=lambda: code)
    control.launcher = types.SimpleNamespace(procs=[types.SimpleNamespace(poll=lambda: None), ended])
    control._look_at_children()
    assert control.stop == Stop("a signal to local rank 2", stop)
    assert control.lost is None
    control = Control()
    control.launcher = types.SimpleNamespace(procs=[types.SimpleNamespace(poll=lambda: -9)])
    control._look_at_children()
    assert control.stop is None
    assert control.lost == "Rank 1 was killed by SIGKILL; its last step: starting."


def test_rank_whose_launcher_ended_while_it_imported_stops(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setenv(LAUNCHER_PID, str(os.getppid()))
    assert parent_process() == os.getppid()
    monkeypatch.setenv(LAUNCHER_PID, "999999999")  # it is the parent no more
    with controlling() as control:
        for _ in range(600):
            if control.stop is not None:
                break
            time.sleep(0.1)
    assert control.stop == Stop("the end of its launcher")
