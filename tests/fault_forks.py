"""A process that imports everything once and forks a ``modiff`` for each line of JSON; started by fault_cases.Forks."""

from __future__ import annotations

import atexit
import json
import os
import sys

from modiff.lit.cli.main import COMMANDS, main


def run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What the child does; it never returns."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    os.environ.update(environment)
    sys.argv = ["modiff", *arguments]
    code = main()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking a forked interpreter apart copies all of its memory, which takes longer than the run


def serve() -> None:
    """Answer until there are no more questions."""
    import importlib

    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    import datasets  # noqa: F401
    import diffusers.pipelines.ddim.pipeline_ddim  # noqa: F401

    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "arguments" in question:
            pid = os.fork()
            if pid == 0:
                run(**question)
            answer: int | None = pid
        else:
            pid = question["code"]
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
