"""Run the install steps of a Dockerfile in a clean virtual environment: a check for machines without Docker.

    python docker/try_install.py docker/Dockerfile.cpu

COPY and the RUN steps under a comment `# install: ...` are done in a temporary folder, with the ENV of the Dockerfile;
then its HEALTHCHECK is run. System packages, users and the base image are left out, and said so.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Plan:
    """What of a Dockerfile can be done without Docker.

    Args:
        environment: Of ENV.
        copies: Sources and the target of each COPY.
        steps: COPY and RUN in their order: ``("copy", sources and target)`` or ``("run", shell command)``.
        health: The command of HEALTHCHECK.
        left_out: Instructions that need Docker.
    """

    environment: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[str, list[str]]] = field(default_factory=list)
    health: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str, bool]]:
    """Instruction, arguments, and whether a comment `# install:` stands above it or above the COPY before it."""
    found, install, pending = [], False, ""
    for line in text.splitlines():
        if line.startswith("#") and not pending:
            install = line.startswith("# install:") or (install and line.startswith("# hadolint"))
            continue
        if not line.strip() and not pending:
            install = False
            continue
        pending += line.rstrip("\\") if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        name, _, arguments = pending.strip().partition(" ")
        found.append((name, arguments.strip(), install))
        pending = ""
    return found


def plan(text: str) -> Plan:
    """Read a Dockerfile."""
    made = Plan()
    for name, arguments, install in instructions(text):
        if name == "ENV":
            made.environment |= dict(part.split("=", 1) for part in shlex.split(arguments))
        elif name == "COPY" and install:
            made.steps.append(("copy", [part for part in arguments.split() if not part.startswith("--")]))
        elif name == "RUN" and install:
            made.steps.append(("run", [arguments]))
        elif name == "HEALTHCHECK":
            made.health = re.findall(r'"([^"]+)"', arguments)
        else:
            made.left_out.append(name)
    return made


def carry_out(made: Plan, folder: Path) -> None:
    """Do it in a folder that stands for the working directory; raises where a step fails."""
    # Where packages come from is this machine's own matter.
    given = {name: text for name, text in made.environment.items() if name != "PIP_EXTRA_INDEX_URL"}
    environment = {**os.environ, **given, "VIRTUAL_ENV": str(folder / "venv")}
    environment["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment.pop("PYTHONPATH", None)
    app = folder / "app"
    app.mkdir()
    for kind, arguments in made.steps:
        print(f"{kind.upper()} {' '.join(arguments)[:110]}", flush=True)
        if kind == "run":
            subprocess.run(["bash", "-euo", "pipefail", "-c", arguments[0]], cwd=app, env=environment, check=True)
            continue
        *sources, target = arguments
        for source in sources:
            place = app / target / Path(source).name if target.endswith("/") else app / target
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    print(f"HEALTHCHECK {' '.join(made.health)}", flush=True)
    subprocess.run(made.health, cwd=folder, env=environment, check=True)


def main(dockerfile: str) -> int:
    """Read, and carry out in a temporary folder."""
    made = plan(Path(dockerfile).read_text())
    print(f"Left out, because it needs Docker: {', '.join(made.left_out)}.")
    with tempfile.TemporaryDirectory(prefix="modiff-docker-") as folder:
        carry_out(made, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
