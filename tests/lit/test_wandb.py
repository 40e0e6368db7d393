"""W&B: never a prompt, never a crash, one run, opened by rank 0."""

from __future__ import annotations

import pytest

from modiff.lit.runs import wandb as wandb_logger
from modiff.lit.runs.wandb import finish_wandb, has_credentials, make_wandb_logger


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path) -> None:
    """No key, no netrc, no mode, no directory of the user's."""
    for key in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for key in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(key, str(tmp_path / key))


class Fake:
    """A logger that notes how it was made."""

    made: list[dict]

    def __init__(self, **options) -> None:
        Fake.made.append(options)
        self.experiment = type("Run", (), {"dir": "x/offline-run-1/files", "finish": lambda *_: 1 / 0})()


@pytest.fixture
def fake(monkeypatch) -> list[dict]:
    Fake.made = []
    monkeypatch.setattr(wandb_logger, "WandbLogger", Fake)
    return Fake.made


def test_credentials_come_from_the_environment_or_netrc(monkeypatch, tmp_path) -> None:
    assert not has_credentials()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert has_credentials()


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
    assert "--wandb online, but there are no credentials (WANDB_API_KEY or netrc); logging offline instead" in first
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

    class Broken(Logger):
        name = version = "broken"
        experiment = type("Run", (), {"dir": "x/y", "finish": lambda *_: None})()

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
