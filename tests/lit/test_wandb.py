"""W&B: never a prompt, never a crash, one run, opened by rank 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from modiff.lit.runs import wandb as wandb_logger
from modiff.lit.runs.wandb import finish_wandb, make_wandb_logger


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path) -> None:
    """No key, no netrc, no mode, no directory of the user's."""
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(wandb_logger, "unreachable", lambda: None)
    # W&B's own answer is tested apart from the modes.
    monkeypatch.setattr(wandb_logger, "has_credentials", lambda: "WANDB_API_KEY" in os.environ)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(key, str(tmp_path / key))


class Fake:
    """A logger that notes how it was made."""

    made: list[dict]

    def __init__(self, **options) -> None:
        Fake.made.append(options)
        self.experiment = type("Run", (), {"dir": "x/offline-run-1/files", "finish": lambda *_, **__: 1 / 0})()


@pytest.fixture
def fake(monkeypatch) -> list[dict]:
    Fake.made = []
    monkeypatch.setattr(wandb_logger, "WandbLogger", Fake)
    return Fake.made


def test_credentials_are_those_that_wandb_finds(tmp_path) -> None:
    """In a process of its own: W&B keeps what it found. `wandb login` writes by the same function as here."""
    code = """
import json, sys
from wandb.sdk.lib.wbauth import write_netrc_auth
from modiff.lit.runs.wandb import has_credentials
found = [has_credentials()]
write_netrc_auth(host="https://api.wandb.ai", api_key="x" * 40)
found.append(has_credentials())
print(json.dumps(found))
"""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_MODE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=keep)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True], done.stderr


def test_auto_without_credentials_is_offline_and_says_how_to_sync(fake, tmp_path, capsys) -> None:
    make_wandb_logger("auto", tmp_path, "name", {}, group="together")
    assert fake[0]["offline"] is True
    assert fake[0]["group"] == "together"
    said = capsys.readouterr().out
    assert said == "W&B: offline run in x/offline-run-1; upload it with: wandb sync x/offline-run-1\n"


def test_auto_with_credentials_is_online(fake, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    make_wandb_logger("auto", tmp_path, "name", {})
    assert fake[0]["offline"] is False
    assert capsys.readouterr().out == ""


def test_online_without_credentials_is_offline_with_a_line(fake, tmp_path, capsys) -> None:
    make_wandb_logger("online", tmp_path, "name", {})
    assert fake[0]["offline"] is True
    first, second = capsys.readouterr().out.splitlines()
    assert first == "W&B: there are no credentials (WANDB_API_KEY, or `wandb login`); logging offline instead."
    assert "wandb sync" in second


@pytest.mark.parametrize("how", ["option", "environment"])
def test_disabled(fake, tmp_path, capsys, monkeypatch, how) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled" if how == "environment" else "online")
    assert make_wandb_logger("disabled" if how == "option" else "auto", tmp_path, "name", {}) is None
    assert fake == []
    assert capsys.readouterr().out == ""


def test_only_rank_0_opens_a_run(fake, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(wandb_logger.rank_zero_only, "rank", 1)
    assert make_wandb_logger("offline", tmp_path, "name", {}) is None
    assert fake == []


def test_key_without_a_network_is_an_offline_run(fake, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb_logger, "unreachable", lambda: "api.wandb.ai is out of reach: no route")
    make_wandb_logger("auto", tmp_path, "name", {})
    assert fake[0]["offline"] is True
    said = capsys.readouterr().out
    assert "W&B: api.wandb.ai is out of reach: no route; logging offline instead." in said
    assert "wandb sync" in said


def test_server_is_tried_for_a_few_seconds_at_most(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "127.0.0.1 is out of reach" in wandb_logger.unreachable()
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert wandb_logger.unreachable() is None


def test_online_that_does_not_start_goes_offline(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    Fake.made = []

    def picky(**options):
        if not options["offline"]:
            raise RuntimeError("quota")
        return Fake(**options)

    monkeypatch.setattr(wandb_logger, "WandbLogger", picky)
    assert make_wandb_logger("online", tmp_path, "name", {}) is not None
    assert "W&B: not available (RuntimeError: quota); logging offline instead." in capsys.readouterr().out


def test_variables_of_wandb_win(fake, tmp_path, monkeypatch) -> None:
    for key, text in {
        "DIR": str(tmp_path / "w"),
        "NAME": "mine",
        "RUN_GROUP": "g",
        "JOB_TYPE": "j",
        "TAGS": "t",
    }.items():
        monkeypatch.setenv(f"WANDB_{key}", text)
    make_wandb_logger("offline", tmp_path, "name", {}, "group", "evaluate", ["tag"])
    assert [fake[0][key] for key in ("name", "group", "job_type", "tags")] == [None] * 4  # W&B reads its own
    assert fake[0]["save_dir"] == str(tmp_path / "w")


def test_run_that_is_started_again_keeps_its_id(fake, tmp_path) -> None:
    for _ in range(2):
        make_wandb_logger("offline", tmp_path, "name", {})
    assert fake[0]["id"] == fake[1]["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert fake[0]["resume"] == "allow"
    make_wandb_logger("offline", tmp_path / "other", "name", {})
    assert fake[2]["id"] != fake[0]["id"]


def test_upload_that_does_not_end_is_not_waited_for(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(wandb_logger, "FINISH_S", 0.05)
    ends = threading.Event()
    run = type("Run", (), {"dir": "x/run-1/files", "finish": lambda *_, **__: ends.wait(60)})()
    finish_wandb(type("Logger", (), {"experiment": run})())
    ends.set()
    assert "the upload did not end within 0 s; upload the rest with: wandb sync x/run-1" in capsys.readouterr().out


def test_failure_to_start_is_a_line(tmp_path, capsys, monkeypatch) -> None:
    def broken(**_):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb_logger, "WandbLogger", broken)
    assert make_wandb_logger("offline", tmp_path, "name", {}) is None
    assert capsys.readouterr().out == "W&B: not available (RuntimeError: no service); metrics go to CSV only.\n"


def test_failure_to_close_is_a_line(fake, tmp_path, capsys) -> None:
    finish_wandb(make_wandb_logger("offline", tmp_path, "name", {}))
    assert "W&B: the run did not close cleanly (ZeroDivisionError" in capsys.readouterr().out
    finish_wandb(None)


def test_failure_inside_wandb_does_not_stop_a_run(modiff, recipe, tmp_path, monkeypatch) -> None:
    from lightning.pytorch.loggers import Logger

    def broken(*_, **__) -> None:
        raise ConnectionError("gone")

    class Broken(Logger):
        name = version = "broken"
        experiment = type(
            "Run", (), {"dir": "x/y", "finish": lambda *_, **__: None, "log": broken, "define_metric": broken}
        )()

        def __init__(self, **_) -> None:
            super().__init__()

        def log_hyperparams(self, *_, **__) -> None:
            pass

        def log_metrics(self, *_, **__) -> None:
            raise ConnectionError("gone")

        def log_image(self, *_, **__) -> None:
            raise ConnectionError("gone")

    monkeypatch.setattr(wandb_logger, "WandbLogger", Broken)
    options = ("--wandb", "offline", "--num_images", "1", "--timing_rounds", "0", "--error_images", "0")
    status, said, err = modiff("evaluate", "--config", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert "W&B: logging failed (ConnectionError: gone); everything is in" in said
    assert (tmp_path / "out" / "metrics.json").exists()


def test_offline_run_is_really_made(tmp_path, capsys) -> None:
    logger = make_wandb_logger("offline", tmp_path, "real", {"steps": 4})
    assert logger is not None
    logger.log_metrics({"student.psnr_db": 30.0}, step=0)
    finish_wandb(logger)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {folder}" in capsys.readouterr().out
    assert list(folder.glob("*.wandb"))


def test_a_process_without_credentials_keeps_an_offline_run(tmp_path) -> None:
    """In a process of its own: W&B reads its settings once, when it is asked for credentials."""
    script = (
        "from pathlib import Path\n"
        "from modiff.lit.runs.wandb import finish_wandb, make_wandb_logger\n"
        f"logger = make_wandb_logger('auto', Path({str(tmp_path / 'run')!r}), 'name', {{}})\n"
        "assert logger is not None\n"
        "finish_wandb(logger)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    environ = {**kept, "HOME": str(tmp_path), "WANDB_SILENT": "true"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "offline run in" in done.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
