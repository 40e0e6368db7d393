"""Runs of real processes that are disturbed at random moments, and what has to come out of them all the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
GONE_S = 60.0
STOPPED = (130, 75)


@dataclass(frozen=True)
class Case:
    """One kind of run and one kind of disturbance.

    Args:
        command: ``evaluate``, ``compare``, ``quantize`` or ``train``.
        launcher: ``plain`` (Lightning starts the ranks), ``torchrun``, or ``srun``: ranks that find the variables of
            SLURM, forked from a process that has imported everything, because imports take most of a tiny run's time.
        ranks: How many.
        number: The signal.
        target: ``one`` rank, ``all`` ranks, or ``launcher``: the first process that was started.
    """

    command: str
    launcher: str
    ranks: int
    number: signal.Signals
    target: str

    def __str__(self) -> str:
        return f"{self.command}-{self.launcher}-{self.ranks}-{self.number.name}-{self.target}"


@dataclass
class Outcome:
    """What one disturbed run did.

    Args:
        signals: How many were sent.
        codes: Exit codes of the first process, of every start.
        gone_s: Seconds from each signal to the end of the last process.
        said: What the starts printed.
        problems: What was wrong; empty is what it should be.
    """

    signals: int = 0
    codes: list[int] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Forks:
    """A process that has imported modiff, and forks ranks."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it before PyTorch is there
        command = [sys.executable, str(Path(__file__).with_name("fault_forks.py")), "modiff"]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **question: Any) -> Any:
        """One line of JSON, and one back."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Fork:
        """Fork a process that runs ``modiff`` with these arguments."""
        return Fork(self.ask(arguments=arguments, environment=environment, log=str(log)), self)

    def close(self) -> None:
        """End it."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


class Fork(psutil.Process):
    """A forked rank."""

    def __init__(self, pid: int, forks: Forks) -> None:
        super().__init__(pid)
        self.forks = forks


class Step:
    """The ranks of one step of a SLURM job, under the names of :class:`subprocess.Popen`."""

    def __init__(self, processes: list[Fork]) -> None:
        self.processes = processes

    def poll(self) -> int | None:
        """The exit code of the first rank, once it has ended."""
        return self._code(self.processes[0])

    def wait(self, timeout: float) -> int:
        """Wait for all; the exit code of the first that is not 0, as srun gives it."""
        end_at = time.monotonic() + timeout
        while any(self._code(process) is None for process in self.processes):
            if time.monotonic() > end_at:
                raise subprocess.TimeoutExpired("srun", timeout)
            time.sleep(0.05)
        return next((code for process in self.processes if (code := self._code(process))), 0)

    @staticmethod
    def _code(process: Fork) -> int | None:
        return process.forks.ask(code=process.pid)


def slurm(rank: int, ranks: int, port: str) -> dict[str, str]:
    """The variables that srun sets, as far as Lightning reads them."""
    names = {"NTASKS": ranks, "NTASKS_PER_NODE": ranks, "PROCID": rank, "LOCALID": rank, "NODEID": 0, "NNODES": 1}
    names |= {"JOB_NAME": "modiff", "STEP_ID": 0, "NODELIST": "localhost", "STEP_NUM_TASKS": ranks}
    return {f"SLURM_{name}": str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


class Bench:
    """A folder with recipes of tiny models, and the results of undisturbed runs.

    Args:
        folder: For everything.
        recipes: One text for each command; ``compare`` takes that of ``evaluate`` twice, at 8 and 6 bits.
    """

    def __init__(self, folder: Path, recipes: dict[str, str]) -> None:
        self.folder = folder
        for name, text in recipes.items():
            (folder / f"{name}.yaml").write_text(text)
        self.seconds: dict[Any, float] = {}
        self._expected: dict[Any, Any] = {}
        self.forks: Forks | None = None

    def close(self) -> None:
        """End the process that ranks are forked from."""
        if self.forks is not None:
            self.forks.close()

    def arguments(self, case: Case, out: Path) -> list[str]:
        """Of ``modiff``."""
        options = ["--trainer.devices", str(case.ranks), "--trainer.accelerator", "cpu"]
        if case.ranks > 1:
            options += ["--trainer.strategy", "ddp"]
        if case.command == "compare":
            recipes = [str(self.folder / "evaluate.yaml"), str(self.folder / "other.yaml")]
            return ["compare", *recipes, *options, "--output", str(out), "--wandb", "disabled"]
        recipe = ["--config", str(self.folder / f"{case.command}.yaml")]
        return [case.command, *recipe, *options, "--output", str(out)]

    def start(self, case: Case, out: Path, log: Path) -> Any:
        """The first process, in a session of its own; with ``srun`` all of them."""
        arguments = self.arguments(case, out)
        environment = {
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            "MODIFF_CACHE": str(out.parent / f"{out.name}-cache"),
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
        }
        if case.launcher == "srun":
            self.forks = self.forks or Forks()
            port = str(free_port())
            return Step(
                [self.forks.start(arguments, environment | slurm(r, case.ranks, port), log) for r in range(case.ranks)]
            )
        command = [sys.executable, "-m", "modiff.lit.cli.main", *arguments]
        if case.launcher == "torchrun":
            port = ["--master-port", str(free_port())]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(case.ranks), *port]
            command = [*torchrun, str(ROOT / "recipes" / "run.py"), *arguments]
        others = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        with log.open("ab") as file:
            return subprocess.Popen(command, env=others | environment, stdout=file, stderr=file, start_new_session=True)

    def expected(self, case: Case) -> Any:
        """Of an undisturbed run; evaluations and comparisons are the same on any number of ranks."""
        ranks = case.ranks if case.command == "train" else 1
        key = (case.command, ranks)
        if key not in self._expected:
            calm = Case(case.command, "srun", ranks, case.number, case.target)
            out, log = self.folder / f"calm-{case.command}-{ranks}", self.folder / "calm.log"
            begin = time.monotonic()
            process = self.start(calm, out, log)
            assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
            self.seconds[key] = time.monotonic() - begin
            self._expected[key] = results(case.command, out)
        self.seconds.setdefault((case.command, case.ranks), self.seconds[key])
        return self._expected[key]

    def disturb(self, case: Case, draw: random.Random, moments: int = 1) -> Outcome:
        """Start, disturb ``moments`` times, let it finish, and compare with the undisturbed run."""
        wanted, outcome = self.expected(case), Outcome()
        out = self.folder / f"{case}-{draw.randrange(10**9)}"
        log = out.with_suffix(".log")
        for _ in range(moments):
            process = self.start(case, out, log)
            self._wait_until_at_work(process, out, case)
            time.sleep(draw.random() * 0.5 * self.seconds[case.command, case.ranks])
            everybody = family(process)
            if not send(case, process, everybody, draw):
                break
            outcome.signals += 1
            outcome.gone_s.append(time_to_be_gone(everybody))
            if outcome.gone_s[-1] > GONE_S:
                outcome.problems.append(f"a process was alive {GONE_S:.0f} s after the signal")
                end(everybody)
            outcome.codes.append(process.wait(timeout=60))
            self._check_marker(case, out, outcome)
        process = self.start(case, out, log)
        try:
            outcome.codes.append(process.wait(timeout=400))
        except subprocess.TimeoutExpired:
            end(family(process))
            outcome.codes.append(-1)
        outcome.said = log.read_text(errors="replace").splitlines()
        if outcome.codes[-1] != 0:
            outcome.problems.append(f"the last start ended with {outcome.codes[-1]}")
        elif (found := results(case.command, out)) != wanted:
            outcome.problems.append(f"results differ: {difference(found, wanted)}")
        return outcome

    @staticmethod
    def _wait_until_at_work(process: Any, out: Path, case: Case) -> None:
        end_at = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < end_at:
            if out.exists() or (case.command == "quantize" and out.with_name(f"{out.name}-cache").exists()):
                return
            time.sleep(0.1)

    @staticmethod
    def _check_marker(case: Case, out: Path, outcome: Outcome) -> None:
        """The status in run.json; nobody is left to write it where everybody was killed."""
        marker = out / "run.json"
        if case.command == "quantize" or not marker.exists():
            return
        status, code = json.loads(marker.read_text())["status"], outcome.codes[-1]
        if case.number == signal.SIGKILL:
            allowed = (
                ("failed", "complete") if case.target == "one" and case.ranks > 1 else ("running", "failed", "complete")
            )
            if case.launcher == "torchrun":  # it asks the others to stop
                allowed = (*allowed, "interrupted", "running")
        elif case.launcher == "torchrun":
            allowed = ("interrupted", "complete")
        else:
            allowed = ("complete",) if code == 0 else ("interrupted",)
            if code not in (0, *STOPPED):
                outcome.problems.append(f"exit code {code}")
        if status not in allowed:
            outcome.problems.append(f"run.json says {status!r} after exit code {code}")


def results(command: str, out: Path) -> Any:
    """What has to be equal, bit for bit."""
    if command == "quantize":
        return (out / "model.safetensors").read_bytes()
    if command == "train":
        saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)
        names = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step")
        exported = [path.read_bytes() for path in sorted((out / "export").rglob("*.safetensors"))]
        return {"exported": exported, "checkpoint": {name: plain(saved.get(name)) for name in names}}
    folders = [out] if command == "evaluate" else [out / "evaluate", out / "other"]
    found = []
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text())
        for key in ("seconds", "seconds_per_image_evaluation", "time_ratio", "provenance"):
            metrics.pop(key)
        images = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("images/*/*.png"))}
        found.append((metrics, images, (folder / "samples.safetensors").read_bytes()))
    return found


def plain(value: Any) -> Any:
    """Tensors as lists, so that everything compares by ``==``."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def difference(found: Any, wanted: Any, where: str = "") -> str:
    """The first place in which two results differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            if found.get(key) != wanted.get(key):
                return difference(found.get(key), wanted.get(key), f"{where}.{key}")
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)) and len(found) == len(wanted):
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            if a != b:
                return difference(a, b, f"{where}[{i}]")
    return f"{where}: {str(found)[:80]} and not {str(wanted)[:80]}"


def family(process: Any) -> list[psutil.Process]:
    """The first process and all below it."""
    if isinstance(process, Step):
        return process.processes
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def ranks_of(everybody: list[psutil.Process]) -> list[psutil.Process]:
    """Those that work: modiff's own, not torchrun's agent and no loader."""
    found = []
    for one in everybody:
        with contextlib.suppress(psutil.Error):
            line = one.cmdline() if alive(one) else []
            if "torch.distributed.run" not in line and any("modiff" in part or "run.py" in part for part in line):
                found.append(one)
    return found


def send(case: Case, process: Any, everybody: list[psutil.Process], draw: random.Random) -> bool:
    """Send the signal; False where the run ended before."""
    workers = ranks_of(everybody)
    if process.poll() is not None or not workers:
        return False
    chosen = {"one": [draw.choice(workers)], "all": workers, "launcher": everybody[:1]}[case.target]
    for one in chosen:
        with contextlib.suppress(psutil.Error):
            one.send_signal(case.number)
    return True


def time_to_be_gone(everybody: list[psutil.Process]) -> float:
    """Seconds until the last of them has ended, GONE_S and a little more at most."""
    begin = time.monotonic()
    while time.monotonic() - begin <= GONE_S + 1:
        if not [one for one in everybody if alive(one)]:
            break
        time.sleep(0.2)
    return time.monotonic() - begin


def alive(one: psutil.Process) -> bool:
    """Whether it runs; one that ended and was not waited for does not."""
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(everybody: list[psutil.Process]) -> None:
    """Kill what is left."""
    for one in everybody:
        with contextlib.suppress(psutil.Error):
            one.kill()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
