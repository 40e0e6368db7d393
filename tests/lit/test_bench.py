"""``modiff bench``: what it runs and in which order, what it says, what it refuses. Nothing here depends on a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import modiff as library
from modiff.config.quant import QuantSpec
from modiff.errors import ConfigError
from modiff.kernels.backend import BACKENDS
from modiff.kernels.cpp.build import problem as cpp_problem
from modiff.lit.bench import clocks as timing
from modiff.lit.bench.arms import COMPILED, EAGER, TEACHER, Arm, Warm, staged
from modiff.lit.bench.clocks import Inputs, Stages, interleave, stages
from modiff.lit.commands import bench
from modiff.quantizers.calibrated import CalibratedRange
from tests.small_models import config, denoiser, noise

CPU = torch.device("cpu")
FUSED = cpp_problem() is None
"""Found out before the tests get a cache of their own, into which the operators would be built anew."""
QUICK = ("--compile", "eager", "--rounds", "2", "--evaluations", "2", "--batch_sizes", "2")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, recipe_text) -> list[Path]:
    """Two recipes of one teacher."""
    folder = tmp_path_factory.mktemp("recipes")
    paths = []
    for name, preset in (("plain", "w8a4-ptq-paper"), ("modulated", "w8a4-modiff-paper")):
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(recipe_text.replace("w8a4-modiff", preset))
    return paths


@pytest.fixture(scope="module")
def benched(tmp_path_factory, recipes) -> tuple[Path, str]:
    """A finished bench of both, and its output."""
    import contextlib
    import io

    from modiff.lit.cli.main import main

    out, said = tmp_path_factory.mktemp("benched") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["bench", *map(str, recipes), *QUICK, "--output", str(out)]) == 0
    return out, said.getvalue()


def test_output_holds_json_markdown_and_plot(benched) -> None:
    out, said = benched
    assert {path.name for path in out.iterdir()} - {".lock", ".holder.json", "status.json"} == {
        "bench.json",
        "bench.md",
        "bench.png",
        "run.json",
    }
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    for name in ("bench.json", "bench.md", "bench.png"):
        assert name in said


def test_json_holds_every_arm_with_times_stages_memory_and_where_it_comes_from(benched) -> None:
    content = json.loads((benched[0] / "bench.json").read_text())
    assert content["command"].startswith("modiff bench ")
    assert list(content["students"]) == ["plain", "modulated"]
    assert content["settings"]["batch_sizes"] == [2]
    assert {"git_commit", "torch", "device", "threads", "cores", "vnni", "seed"} <= set(content["provenance"])
    (entry,) = content["results"]
    assert (entry["batch_size"], entry["mode"]) == (2, EAGER)
    assert list(entry["students"]) == ["plain", "modulated"]
    for name, arm in ((TEACHER, entry[TEACHER]), *entry["students"].items()):
        seconds = arm["seconds"]
        assert [len(turn) for turn in seconds["values"]] == [2, 2]
        assert seconds["count"] == 4
        assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"] <= seconds["max"]
        parts = [arm["stages"][key] for key in ("products_s", "modulation_s", "rest_s")]
        assert sum(parts) == pytest.approx(seconds["median"])
        assert arm["compile_s"] is None
        assert arm["first_evaluation_s"] > 0
        assert arm["peak_memory_mib"] >= 0
        assert (arm["state_mib"] > 0) == (name == "modulated")
        assert arm["stored_weight_mib"] > 0
        assert (parts[1] > 0) == (name != TEACHER)
        assert ("ratio" in arm) == (name != TEACHER)
    stored = {n: a["stored_weight_mib"] for n, a in entry["students"].items()}
    assert stored["plain"] == stored["modulated"] < entry[TEACHER]["stored_weight_mib"]
    names = [operator["name"] for operator in entry["students"]["plain"]["operators"]]
    assert names == [backend["name"] for backend in content["students"]["plain"]["executed"][EAGER]]
    assert "conv_in" in names
    for facts in content["students"].values():
        rows = facts["executed"][EAGER]
        assert {b["backend"] for b in rows} <= {"onednn", "simulate"}
        assert all((b["backend"] == "onednn") == (b["why"] == "") for b in rows)


def test_markdown_says_what_was_run_in_sentences_and_tables(benched) -> None:
    out, said = benched
    content, page = json.loads((out / "bench.json").read_text()), (out / "bench.md").read_text()
    assert len(content["summary"]) == 2
    for text in content["summary"]:
        assert "the teacher" in text
        assert text in page
        assert text in said.replace("\n", " ").replace("  ", " ")
    assert content["command"] in page
    assert page.count("| 2 | eager |") == 3
    assert "## Backends" in page


def test_complete_bench_runs_nothing(benched, recipes, modiff, monkeypatch) -> None:
    monkeypatch.setattr(bench, "build", None)
    status, said, err = modiff("bench", *recipes, *QUICK, "--output", benched[0])
    assert status == 0, err
    assert "nothing to do" in said


def test_packed_student_is_benched(recipe, modiff, tmp_path) -> None:
    status, _, err = modiff("quantize", "--config", recipe, "--output", tmp_path / "packed")
    assert status == 0, err
    options = (*QUICK, "--ckpt", tmp_path / "packed", "--model.preset", "null", "--output", tmp_path / "out")
    status, _, err = modiff("bench", recipe, *options)
    assert status == 0, err
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["students"]["tiny"]["ckpt"] == str(tmp_path / "packed")
    assert content["results"][0]["students"]["tiny"]["state_mib"] > 0


def test_student_with_calibrated_ranges_starts_again_where_its_trajectory_would_be_too_long() -> None:
    length, calls = 5, []
    student = library.quantize(denoiser(), calibrated_config())
    operators = [student.conv_in, student.time, student.conv_out]
    for operator in operators:
        found = CalibratedRange.from_range(torch.tensor([[-3.0]]), torch.tensor([[3.0]]), QuantSpec(8), length)
        operator.use_range(found)
    arm = Arm("student", EAGER, student, None, student)
    args = noise(1)[0]
    inputs = Inputs(torch.zeros(1), torch.ones(1), 20)
    call = lambda x, t: (calls.append(int(t)), student(*args))  # noqa: E731
    assert arm.limit == length
    with torch.no_grad(), Warm(arm, call, inputs, 2) as run:
        interleave({"a": call}, inputs, 4, 2, CPU, 2, lambda name: run.ready(2))
    assert student.conv_in.state.last.total == 4
    assert len(calls) == 4 * (2 + 2)  # two turns of two do not fit into one trajectory of five
    with pytest.raises(ConfigError, match=r"student is calibrated for trajectories of 5 evaluations; 2 warm-ups and a"):
        Warm(arm, call, inputs, 4)


def calibrated_config() -> library.QuantConfig:
    spec = QuantSpec(8, "tensor", range="calibrated")
    return library.QuantConfig(QuantSpec(8, "channel"), spec, library.Modulation())


def test_both_modes_take_turns_in_one_round(recipe, modiff, tmp_path, monkeypatch) -> None:
    """Compiling is replaced by nothing: the test is about who runs when."""
    order: list[str] = []
    plain = timing.interleave
    compiled: list[nn.Module] = []

    def spied(calls, *args):
        seen = {name: lambda x, t, c=c, n=name: (order.append(n), c(x, t))[1] for name, c in calls.items()}
        return plain(seen, *args)

    monkeypatch.setattr("modiff.lit.bench.arms.interleave", spied)
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    monkeypatch.setattr("modiff.lit.bench.arms.compile_student", lambda module, mode: compiled.append(module) or module)
    monkeypatch.setattr(bench, "compiler_problem", lambda device: None)
    options = (
        "--compile",
        "both",
        "--bfloat16",
        "false",
        "--rounds",
        "2",
        "--evaluations",
        "1",
        "--batch_sizes",
        "1",
        "2",
    )
    status, _, err = modiff("bench", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    one = ["eager/teacher", "eager/tiny", "compiled/teacher", "compiled/tiny"]
    assert order == 4 * one  # two rounds of two batch sizes
    assert len(compiled) == 2
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(e["batch_size"], e["mode"]) for e in content["results"]] == [(1, EAGER), (1, COMPILED)] + [
        (2, EAGER),
        (2, COMPILED),
    ]
    assert all(e["students"]["tiny"]["compile_s"] > 0 for e in content["results"] if e["mode"] == COMPILED)


def test_without_a_compiler_one_line_says_so(recipe, modiff, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench, "compiler_problem", lambda device: "no C++ compiler")
    options = ("--rounds", "1", "--evaluations", "1", "--batch_sizes", "1")
    status, said, err = modiff("bench", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert said.count("torch.compile finds no working compiler here (no C++ compiler); everything runs eagerly.") == 1
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["compiler_problem"] == "no C++ compiler"
    assert [entry["mode"] for entry in content["results"]] == [EAGER]
    status, _, err = modiff("bench", recipe, "--compile", "compiled", "--output", tmp_path / "other")
    assert status == 1
    assert "--compile compiled, but torch.compile finds no working compiler (no C++ compiler). Use eager." in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch_sizes", "0"), "--batch_sizes is 0; allowed are whole numbers, 1 or more."),
        (("--batch_sizes", "2", "2"), "names one twice. Give each once."),
        (("--rounds", "0"), "--rounds is 0; allowed are whole numbers, 1 or more."),
        (("--evaluations", "-1"), "--evaluations is -1; allowed are whole numbers, 1 or more."),
        (("--threads", "0"), "--threads is 0; allowed are whole numbers, 1 or more."),
        (("--num_images", "4", "--batch_sizes", "4"), "--num_images and --batch_sizes are both given. Remove one"),
        (("--compile", "twice"), "compile"),
        (("--model.preset", "null"), "quantizes nothing: give --model.preset, for example w8a6-modiff"),
        (("--ckpt", "nowhere"), "nowhere does not exist. Give a directory that modiff.save wrote"),
        (("--trainer.devices", "2"), "modiff bench runs on one device, not 2. Add --trainer.devices 1."),
    ],
)
def test_bad_options_are_refused(recipe, modiff, tmp_path, options, message) -> None:
    status, _, err = modiff("bench", recipe, *options, "--output", tmp_path / "out")
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_unknown_recipe_is_refused(recipe, modiff, tmp_path) -> None:
    status, _, err = modiff("bench", recipe, tmp_path / "none.yaml", "--output", tmp_path / "out")
    assert status == 1
    assert f"{tmp_path / 'none.yaml'} does not exist. Give a file" in err


def test_one_checkpoint_and_two_recipes_are_refused(recipes) -> None:
    with pytest.raises(ConfigError, match=r"--ckpt out is one student, but 2 recipes are given. Give one recipe"):
        bench.parse([*map(str, recipes), "--ckpt", "out"])


def test_recipe_that_calibrates_is_refused_without_its_checkpoint(recipe, modiff, tmp_path) -> None:
    options = ("--model.calibration.method", "gptq", "--output", tmp_path / "out")
    status, _, err = modiff("bench", recipe, *QUICK, *options)
    assert status == 1
    assert "tiny is calibrated by its recipe, which modiff bench does not do. Pack it first: modiff quantize" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("path: ", "name: ddpm-cifar10\n    tiny: true\n    image_size: null #"), "differ in model.teacher"),
        (("accelerator: cpu", "accelerator: cpu\n  precision: bf16-mixed"), "differ in trainer.precision"),
        (("seed: 0", "seed: 1"), "differ in seed (0 and 1); a bench has one teacher. Give recipes of the same"),
    ],
)
def test_recipes_of_different_teachers_are_refused(recipes, modiff, tmp_path, change, message) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(recipes[0].read_text().replace(*change))
    status, _, err = modiff("bench", recipes[0], other, *QUICK, "--output", tmp_path / "out")
    assert status == 1
    assert f"plain and other {message}" in err


def test_num_images_is_one_batch_size() -> None:
    assert bench.parse(["a.yaml"]).batch_sizes == [1, 8]
    assert bench.parse(["a.yaml", "--num_images", "4"]).batch_sizes == [4]


def test_calls_take_turns_on_the_same_inputs() -> None:
    seen: list[tuple[str, float, int]] = []
    inputs = Inputs(torch.zeros(1), torch.ones(1), 7, timesteps=101)
    calls = {name: lambda x, t, n=name: seen.append((n, float(x), int(t))) for name in "ab"}
    times = interleave(calls, inputs, rounds=3, evaluations=2, device=CPU, first=1)
    assert [name for name, _, _ in seen] == list("aabb" * 3)
    a, b = ([(x, t) for n, x, t in seen if n == name] for name in "ab")
    assert a == b
    assert [t for _, t in a] == [83, 67, 50, 33, 17, 0]  # six evaluations, all different, down to 0
    assert [len(times["a"]), len(times["b"][0])] == [3, 2]


@pytest.mark.parametrize("backend", ["simulate", "onednn"])
def test_clocks_tell_products_from_what_is_around_them(monkeypatch, backend) -> None:
    """A counter stands for the clock: a product takes 100, and each look at the clock 1."""
    now = [0.0]

    def tick() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", tick)
    model = library.quantize(denoiser(), dataclasses.replace(config("w8a4-modiff-paper"), backend=backend))
    owner, method = type(BACKENDS[backend]), "multiply"
    plain = getattr(owner, method)
    spent = lambda self, *a, **k: (now.__setitem__(0, now[0] + 100), plain(self, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(owner, method, spent)
    operators = {name: getattr(model, name) for name in ("conv_in", "time", "conv_out")}
    with library.trajectory(model):
        for args in noise(2):
            found = stages(operators, lambda args=args: model(*args), CPU)
    assert [times.product for times in found.operators.values()] == [101, 101, 101]
    assert [times.forward for times in found.operators.values()] == [103, 103, 103]
    assert (found.products, found.modulation, found.rest) == (303, 6, found.whole - 309)
    assert "product" not in vars(model.conv_in)
    assert model.conv_in.wrapper is None
    assert not model.conv_in._forward_hooks
    full = stages({"norm": model.norm}, lambda: model.norm(torch.randn(1, 8, 2, 2)), CPU)
    assert (full.products, full.modulation, full.whole) == (1, 0, 3)


def test_the_teacher_in_bfloat16_is_timed_beside_the_compiled_one(recipe, modiff, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(bench, "compiler_problem", lambda device: None)
    options = (
        "--compile",
        "compiled",
        "--model.preset",
        "w8a8-modiff",
        "--bfloat16",
        "true",
        "--rounds",
        "2",
        "--evaluations",
        "1",
        "--batch_sizes",
        "2",
    )
    status, said, err = modiff("bench", recipe, *options, "--output", tmp_path / "out")
    assert status == 0, err
    assert "compiled/teacher in bfloat16" in said
    entry = json.loads((tmp_path / "out" / "bench.json").read_text())["results"][0]
    assert entry["students"]["teacher in bfloat16"]["ratio"]["median"] > 0
    page = (tmp_path / "out" / "bench.md").read_text()
    assert "speed, x compiled teacher in bfloat16 (quartiles)" in page
    assert entry["students"]["tiny"]["ratio_to_bfloat16"]["median"] > 0
    assert "times that of the teacher in bfloat16; compiled, " in page
    # What runs when compiled is named, not what would run eagerly.
    executed = json.loads((tmp_path / "out" / "bench.json").read_text())["students"]["tiny"]["executed"]
    assert list(executed) == [COMPILED]
    assert any(row["backend"].startswith("cpp") for row in executed[COMPILED]) == FUSED
    assert ("| cpp, after group norm and SiLU |" in page) == FUSED


def test_stages_of_fused_students_are_those_of_the_clocks_inside() -> None:
    found = {"eager/teacher": Stages(10.0), "compiled/student": Stages(9.0, fused=(4.0, 1.0, 2.0))}
    turns = {TEACHER: [[10.0]], "student": [[8.0]]}
    stage = staged(COMPILED, turns, found)["student"]
    assert (stage["products_s"], stage["modulation_s"], stage["rest_s"]) == (4.0, 2.0, 2.0)
    assert "inside the C++ operators" in stage["how"]
