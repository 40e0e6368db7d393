"""A metric that is declared in one place appears everywhere: metrics.json, table, report, CSV and W&B."""

from __future__ import annotations

import csv
import json

import pytest

from modiff.errors import ConfigError
from modiff.lit.report.tables import markdown_table
from modiff.lit.runs import wandb as wandb_logger
from modiff.lit.runs.results import read_result
from modiff.metrics import registry
from modiff.metrics.figures import Figure, Findings, Measure, measure
from modiff.metrics.sums import MeanOverImages


@pytest.fixture
def brightness(monkeypatch):
    """A measure of this test alone."""
    monkeypatch.setattr(registry, "MEASURES", dict(registry.MEASURES))
    monkeypatch.setattr("modiff.metrics.figures.MEASURES", registry.MEASURES)
    monkeypatch.setattr("modiff.lit.callbacks.fidelity.MEASURES", registry.MEASURES)

    @measure
    class Brightness(Measure):
        figures = (
            Figure("brightness", "Brightness gained", "gray levels", "lower", column="bright-\nness", order=15),
            Figure("glare", "Glare", column="glare", reason="no image is brighter than white"),
        )

        def __init__(self, setting) -> None:
            super().__init__(setting)
            self.mean = MeanOverImages()

        def update(self, images) -> None:
            self.mean.update(255 * (images.student - images.teacher).flatten(1).mean(dim=1))

        def compute(self) -> Findings:
            return Findings({"student.brightness": self.mean.compute(), "student.glare": None})


class Run:
    """A W&B run that notes the numbers it is given."""

    dir = "x/y/files"

    def __init__(self) -> None:
        self.summary: dict = {}
        self.config: dict = {}

    def __getattr__(self, name):
        return lambda *_, **__: None

    def log(self, numbers, **_) -> None:
        Noted.last.numbers |= numbers


class Noted:
    """A W&B logger that notes what it is given."""

    def __init__(self, **_) -> None:
        self.numbers: dict = {}
        self.experiment = Run()
        Noted.last = self

    def __getattr__(self, name):
        return lambda *_, **__: None

    def log_metrics(self, metrics, step=None) -> None:
        self.numbers |= metrics


@pytest.mark.usefixtures("brightness")
def test_a_new_metric_is_seen_everywhere(modiff, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(wandb_logger, "WandbLogger", Noted)
    out = tmp_path / "out"
    options = ("--wandb", "offline", "--num_images", "3", "--error_images", "0", "--timing_rounds", "0")
    status, said, err = modiff("evaluate", "--config", recipe, *options, "--output", out)
    assert status == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    value = metrics["student"]["brightness"]
    assert value != 0
    assert metrics["student"]["glare"] is None
    assert metrics["reasons"]["student.glare"] == "no image is brighter than white"
    assert "Brightness gained, gray levels" in said
    assert f"Report: {out / 'report.html'}" in said.replace("\n", "")
    table = markdown_table([("tiny", read_result(out))])
    assert table.splitlines()[0].startswith(
        "| recipe | PSNR to the teacher's images, dB | Brightness gained, gray levels"
    )
    assert "Glare not available (tiny): no image is brighter than white." in table
    page = (out / "report.html").read_text()
    assert "Brightness gained, gray levels" in page
    assert "Glare (student), not available: no image is brighter than white" in page
    with next((out / "logs").glob("metrics.csv")).open() as file:
        logged = [row["student.brightness"] for row in csv.DictReader(file) if row.get("student.brightness")]
    assert float(logged[-1]) == pytest.approx(value)
    assert Noted.last.numbers["student.brightness"] == value


@pytest.mark.usefixtures("brightness")
def test_a_figure_is_declared_once() -> None:
    with pytest.raises(ConfigError, match="The figure 'glare' is declared twice. Give each figure one measure"):

        @measure
        class Another(Measure):
            figures = (Figure("glare", "Glare"),)
