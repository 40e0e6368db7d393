"""The CIFAR-10 benchmark: its rows, and one trial of it on a tiny teacher."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modiff.metrics.statistics import FeatureStatistics

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cifar10  # noqa: E402
import cifar10_report  # noqa: E402
import cifar10_table  # noqa: E402


@pytest.fixture
def benchmark(tiny_teacher: Path, tiny_features: Path, tmp_path: Path) -> Callable[..., dict]:
    """Run a trial in this process; returns its rows by id."""
    generator = torch.Generator().manual_seed(0)
    reference = tmp_path / "reference.safetensors"
    FeatureStatistics.from_features(torch.randn(20, 4, generator=generator), "tiny-features").save(reference)

    def run(*options: str, features: bool = True) -> dict:
        args = [
            "--teacher_small",
            tiny_teacher,
            "--output",
            tmp_path / "runs",
            "--num_images",
            "8",
            "--batch_size",
            "4",
        ]
        args += ["--steps", "3", "--device", "cpu", "--precision", "32-true", "--timing_rounds", "1"]
        args += ["--features", tiny_features, "--reference", reference] if features else []
        assert cifar10.main([str(arg) for arg in (*args, *options)]) == 0
        rows = json.loads((tmp_path / "runs" / "cifar10.json").read_text())["rows"]
        return {row["id"]: row for row in rows}

    return run


def test_rows_are_unique_and_start_from_shipped_recipes() -> None:
    rows = cifar10_table.all_rows()
    assert len({row.id for row in rows}) == len(rows)
    assert all((ROOT / row.recipe).is_file() for row in rows)
    wanted = {(w, a, arm) for w in (8, 4) for a in (8, 6, 4, 3, 2) for arm in cifar10_table.ARMS}
    for steps in (20, 100):
        for seed in (0, 1, 2):
            found = {
                (r.weight_bits, r.activation_bits, r.arm)
                for r in rows
                if (r.teacher, r.granularity, r.refresh_every, r.steps, r.seed)
                == ("small", "sample", None, steps, seed)
            }
            assert wanted <= found


def test_the_large_teacher_is_measured_in_the_order_of_its_issue() -> None:
    rows = cifar10_table.large_rows()
    assert [row.activation_bits for row in rows if row.refresh_every is None] == [None, 4, 4, 3, 3, 6, 6, 8, 8]
    assert {(row.weight_bits, row.steps, row.granularity) for row in rows} == {(8, 100, "sample")}


def test_the_papers_figures_stand_beside_the_right_rows() -> None:
    row = cifar10_table.Row
    assert row("small", 8, 4, "modiff", "sample", None, 100, 0).paper_fid == 4.31
    assert row("small", 8, 4, "ptq", "tensor", None, 100, 0).paper_fid == 306.1
    assert row("small", 8, 4, "modiff", "tensor", None, 20, 0).paper_fid == 22.1
    assert row("small", 8, 4, "modiff", "sample", None, 20, 0).paper_fid is None
    assert row("small", 8, 4, "modiff_no_compensation", "sample", None, 100, 0).paper_fid is None
    assert row("small", 8, 3, "modiff", "sample", 10, 100, 0).paper_fid is None


def test_the_committed_files_name_every_row_and_agree_with_each_other() -> None:
    rows = json.loads((ROOT / "benchmarks" / "cifar10.json").read_text())["rows"]
    assert [row["id"] for row in rows] == [row.id for row in cifar10_table.all_rows()]
    for row in rows:
        assert row["measured"] or not {"fid", "psnr_db", "time_ratio"} & set(row)
        assert "/" + row["command"].split("recipes/")[1].split(" ")[0] in f"/{row['command']}"
    assert (ROOT / "benchmarks" / "cifar10.md").read_text() == cifar10_report.markdown(rows)


def test_a_trial_runs_end_to_end_marks_its_rows_and_goes_on(benchmark, tmp_path, capsys, monkeypatch) -> None:
    match = ["--match", "small/steps100/seed0/w8a4"]
    rows = benchmark(*match, "--limit", "2")
    assert "time " in capsys.readouterr().out
    measured = [row for row in rows.values() if row["measured"]]
    assert [row["id"].rpartition("/")[2] for row in measured] == ["w8a4_ptq", "w8a4_modiff"]
    for row in measured:
        assert (row["num_images"], row["seed"], row["features"], row["steps"]) == (8, 0, "tiny-features", 3)
        assert row["fid"] > 0
        assert row["fid_to_teacher"] > 0
        assert row["psnr_db"] > 0
        assert row["evaluations"]["total"] == 3
        assert row["machine"]["device"]
        assert str(tmp_path) not in json.dumps(row)
    assert measured[0]["teacher_fid"] == measured[1]["teacher_fid"]
    report = (tmp_path / "runs" / "cifar10.md").read_text()
    assert "**2 of" in report
    assert f"{measured[0]['psnr_db']:.2f}" in report
    # The next session keeps these two and takes the third.
    done = []
    evaluate = cifar10.evaluate
    monkeypatch.setattr(cifar10, "evaluate", lambda row, *args: done.append(row.name) or evaluate(row, *args))
    again = benchmark(*match, "--limit", "1")
    assert done == ["w8a4_modiff_no_compensation"]
    assert all(again[row["id"]] == row for row in measured)


def test_a_row_is_the_same_again_from_its_command(benchmark, modiff, tiny_teacher, tiny_features, tmp_path) -> None:
    row = benchmark("--match", "steps100/seed1/w8a3_modiff_refresh", "--limit", "1")[
        "small/steps100/seed1/w8a3_modiff_refresh10"
    ]
    assert row["evaluations"] == {"total": 3, "quantized": 2}
    values = {"$TEACHER": tiny_teacher, "$FEATURES": tiny_features, "$REFERENCE": tmp_path / "reference.safetensors"}
    program, *args = [str(values.get(word, word)) for word in row["command"].split()]
    assert program == "modiff"
    args[args.index("--config") + 1] = str(ROOT / args[args.index("--config") + 1])
    status, _, err = modiff(
        *args, "--output", tmp_path / "again", "--wandb", "disabled", "--trainer.accelerator", "cpu"
    )
    assert status == 0, err
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert {key: metrics["student"][key] for key in cifar10.METRICS} == {key: row[key] for key in cifar10.METRICS}


def test_weights_only_is_the_full_precision_row_of_the_paper_with_calibrated_weights_at_w4(benchmark, capsys) -> None:
    rows = benchmark("--match", "steps20/seed2/w4a32", "--limit", "1")
    row = rows["small/steps20/seed2/w4a32_ptq"]
    assert row["measured"]
    assert row["evaluations"] == {"total": 3, "quantized": 0}
    assert "Calibrating by gptq" in capsys.readouterr().out
    methods = {(row["weight_bits"], row["weight_method"]) for row in rows.values()}
    assert methods == {(8, "nearest"), (4, "gptq")}


def test_rows_of_another_teacher_or_precision_are_not_mixed(benchmark, tmp_path) -> None:
    match = ["--match", "steps20/seed2/w8a8_ptq"]
    benchmark(*match)
    with pytest.raises(SystemExit, match="precision '32-true', now it is 'bf16-mixed': give another --results"):
        benchmark(*match, "--precision", "bf16-mixed")
    path = tmp_path / "runs" / "cifar10.json"
    text = path.read_text()
    fingerprint = next(r["teacher_fingerprint"] for r in json.loads(text)["rows"] if r["measured"])
    path.write_text(text.replace(fingerprint, "0123456789abcdef"))
    with pytest.raises(SystemExit, match="holds rows of another small teacher"):
        benchmark(*match)


def test_a_teacher_that_is_not_there_leaves_its_rows_open(benchmark) -> None:
    rows = benchmark("--only", "large", "--teacher_large", "nowhere")
    assert not any(row["measured"] for row in rows.values())


def test_order_calls_only_a_factor_of_two_a_difference() -> None:
    assert cifar10_report.order(10.0, 4.9) == "modulated better"
    assert cifar10_report.order(10.0, 5.1) == "no clear difference"
    assert cifar10_report.order(1.0, 2.0) == "plain better"
