"""``modiff bench``: teacher against students in one process, and which stage the time goes to."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer

from modiff.compiling.probe import compiler_problem
from modiff.errors import CalibrationError, ConfigError
from modiff.lit.bench.arms import COMPILED, EAGER, Bench
from modiff.lit.bench.results import bench_plot, markdown, sentences, terminal_table, unequal_arms
from modiff.lit.callbacks.provenance import device_name, git_commit, package_versions
from modiff.lit.cli.errors import parse_plainly
from modiff.lit.cli.student import StudentCLI
from modiff.lit.commands.compare import split_forwarded, unique_names
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.control import current
from modiff.lit.runs.directory import RunDirectory
from modiff.lit.runs.launchers import settle_single_rank
from modiff.lit.runs.running import rank_zero
from modiff.storage.atomic import write_json, write_text
from modiff.teachers.zoo import Teacher, load_teacher

SHARED = ("teacher", "guidance")


def make_parser() -> ArgumentParser:
    """Make the parser of ``modiff bench``."""
    parser = ArgumentParser(
        prog="modiff bench",
        exit_on_error=False,
        description="Time the students of several recipes against their teacher, in one process and in turns. Options "
        "that begin with --model., --data. or --trainer. go to every recipe.",
    )
    parser.add_argument("recipes", nargs="+", type=str, help="Recipe files of modiff evaluate, of one teacher.")
    parser.add_argument("--output", type=str, default="runs/bench", help="Directory of the results.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace another run in --output.")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=None, help="Images per evaluation; default 1 8.")
    parser.add_argument("--num_images", type=int | None, default=None, help="The same as one batch size.")
    parser.add_argument(
        "--compile",
        type=Literal["both", "eager", "compiled"],
        default="both",
        help="Teacher and students as they are, through torch.compile and modiff.compile, or both.",
    )
    parser.add_argument(
        "--compile_mode",
        type=Literal["auto", "fused", "stages", "blocks", "whole"],
        default="auto",
        help="What modiff.compile compiles of the students; the teacher is compiled as a whole.",
    )
    parser.add_argument(
        "--bfloat16",
        type=bool | None,
        default=None,
        help="Time the compiled teacher in bfloat16 too; None: on CPUs that have it.",
    )
    parser.add_argument("--rounds", type=int, default=7, help="Turns of each denoiser.")
    parser.add_argument("--evaluations", type=int, default=3, help="Timed evaluations in a turn.")
    parser.add_argument("--channels_last", type=bool, default=True, help="Weights and x in channels-last layout.")
    parser.add_argument("--threads", type=int | None, default=None, help="Of PyTorch on the CPU; None: as it is.")
    parser.add_argument("--ckpt", type=str | None, default=None, help="Packed student, in place of a quantization.")
    parser.add_argument("--seed", type=int | None, default=None, help="Seed; None: what the recipes say.")
    return parser


def bench(args: Sequence[str]) -> int:
    """``modiff bench A.yaml B.yaml ...``."""
    settle_single_rank("bench")
    own, forwarded = split_forwarded(args)
    options = parse(own)
    names = unique_names(options.recipes)
    # Every recipe is parsed before anything is built.
    clis = {name: _cli(path, options, forwarded) for name, path in zip(names, options.recipes, strict=True)}
    check_shared(clis)
    settings = {
        key: options[key]
        for key in (
            "batch_sizes",
            "compile",
            "compile_mode",
            "bfloat16",
            "rounds",
            "evaluations",
            "channels_last",
            "threads",
        )
    }
    identity = {"command": "bench", "recipes": {n: cli.identity() for n, cli in clis.items()}, "settings": settings}
    run = RunDirectory(Path(options.output), identity, options.overwrite)
    if run.complete and run.resumed:
        print(f"{run.path} holds this very bench, complete; nothing to do (--overwrite true repeats it).")
        return 0
    with current().marking(run), _threads(options.threads):
        trainer = _trainer(next(iter(clis.values())))
        modules = build(clis, trainer.strategy.root_device, options.channels_last)
        rank_zero(run.claim, "bench")
        modes, problem = modes_of(options.compile, trainer.strategy.root_device)
        results, executed = measure(modules, modes, trainer, options)
        facts = {
            "command": shlex.join(["modiff", "bench", *args]),
            "teacher": next(iter(modules.values())).spec.title,
            "students": {name: _student_facts(clis[name], executed[name]) for name in modules},
            "settings": settings,
            "compiler_problem": problem,
            "provenance": provenance(trainer.strategy.root_device, clis),
        }
        by_mode = [{name: executed[name][mode] for name in executed} for mode in modes]
        unequal = [*dict.fromkeys(text for students in by_mode for text in unequal_arms(students))]
        finish(run, {**facts, "summary": [*unequal, *sentences(results)], "results": results})
    return 0


def parse(args: Sequence[str]) -> Namespace:
    """The options of the bench itself.

    Raises:
        ConfigError: One is unknown, out of range, or contradicts another.
    """
    options = parse_plainly(make_parser(), args)
    if options.num_images is not None:
        if options.batch_sizes is not None:
            raise ConfigError("--num_images and --batch_sizes are both given. Remove one of them.")
        options.batch_sizes = [options.num_images]
    options.batch_sizes = [1, 8] if options.batch_sizes is None else options.batch_sizes
    checks = [("batch_sizes", size) for size in options.batch_sizes]
    checks += [(key, options[key]) for key in ("rounds", "evaluations")]
    checks += [] if options.threads is None else [("threads", options.threads)]
    for key, value in checks:
        if value < 1:
            raise ConfigError(f"--{key} is {value}; allowed are whole numbers, 1 or more.")
    if len(set(options.batch_sizes)) < len(options.batch_sizes):
        raise ConfigError(f"--batch_sizes {options.batch_sizes} names one twice. Give each once.")
    if options.ckpt is not None and len(options.recipes) > 1:
        raise ConfigError(
            f"--ckpt {options.ckpt} is one student, but {len(options.recipes)} recipes are given. Give one recipe, of "
            "its teacher."
        )
    return options


def _cli(path: str, options: Namespace, forwarded: Sequence[str]) -> StudentCLI:
    args = ["--config", path, *forwarded]
    for key in ("ckpt", "seed"):
        if options[key] is not None:
            args += [f"--{key}", str(options[key])]
    cli = StudentCLI("bench", args)
    if cli.model.config is None and cli.config.ckpt is None:
        raise ConfigError(
            f"{path} quantizes nothing: give --model.preset, for example w8a6-modiff, --model.config or --ckpt."
        )
    return cli


def check_shared(clis: dict[str, StudentCLI]) -> None:
    """Refuse recipes of different teachers.

    Raises:
        ConfigError: Two recipes differ in the teacher, the guidance, the precision or the conditions.
    """
    first_name, first = "", {}
    for name, cli in clis.items():
        identity = cli.identity()
        found = {f"model.{key}": identity["model"][key] for key in SHARED}
        found |= {"trainer.precision": identity["precision"], "seed": identity["seed"]}
        found |= {"data": identity.get("conditions")}
        first_name, first = first_name or name, first or found
        for key, value in found.items():
            if value != first[key]:
                raise ConfigError(
                    f"{first_name} and {name} differ in {key} ({first[key]!r} and {value!r}); a bench has one teacher. "
                    f"Give recipes of the same, or set --{key} for all of them."
                )


def build(clis: dict[str, StudentCLI], device: torch.device, channels_last: bool) -> dict[str, LitStudent]:
    """The recipes' modules, which share the teacher, on the device and in the layout."""
    loaded: Teacher | None = None
    modules: dict[str, LitStudent] = {}
    for name, cli in clis.items():
        if loaded is None:
            loaded = load_teacher(cli.model.spec)
            loaded.denoiser.to(
                device=device, memory_format=torch.channels_last if channels_last else torch.contiguous_format
            )
        module = cli.prepare_model(loaded)
        if not module.calibrated:
            raise CalibrationError(
                f"{name} is calibrated by its recipe, which modiff bench does not do. Pack it first: modiff quantize "
                "--config RECIPE --output DIR; then give --ckpt DIR. Or add --model.calibration null."
            )
        modules[name] = module.to(device)
    return modules


def measure(
    modules: dict[str, LitStudent], modes: tuple[str, ...], trainer: Trainer, options: Namespace
) -> tuple[list[Any], dict[str, Any]]:
    """Measure every batch size; the compiler cache starts empty.

    Returns:
        Entries of each mode and size, and the backend of each operator by student and mode.
    """
    device = trainer.strategy.root_device
    results: list[Any] = []
    with fresh_compiler_cache() if COMPILED in modes else nullcontext():
        context = trainer.precision_plugin.forward_context
        bfloat16 = COMPILED in modes and wants_bfloat16(options.bfloat16, device)
        arms = Bench(modules, modes, device, context, options.channels_last, options.compile_mode, bfloat16)
        for size in options.batch_sizes:
            rank_zero(print, f"batch {size}: {options.rounds} rounds of {', '.join(a.key for a in arms.timed)}")
            results += arms.measure(size, options.rounds, options.evaluations)
        executed = arms.executed()
    return results, executed


def wants_bfloat16(asked: bool | None, device: torch.device) -> bool:
    """Whether the teacher in bfloat16 is timed too: as asked, else on CPUs that compute in it."""
    if asked is not None:
        return asked
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def modes_of(choice: str, device: torch.device) -> tuple[tuple[str, ...], str | None]:
    """The modes to time, and the reason if compiled ones are not among them.

    Raises:
        ConfigError: Compiled ones alone are asked for, and there is no compiler.
    """
    problem = None if choice == EAGER else compiler_problem(device)
    if problem is None:
        return ((EAGER, COMPILED) if choice == "both" else (choice,)), None
    if choice == COMPILED:
        raise ConfigError(f"--compile compiled, but torch.compile finds no working compiler ({problem}). Use eager.")
    rank_zero(print, f"torch.compile finds no working compiler here ({problem}); everything runs eagerly.")
    return (EAGER,), problem


@contextmanager
def fresh_compiler_cache() -> Iterator[None]:
    """Start with an empty compiler cache, so that times to compile are those of a first use."""
    from torch._inductor.utils import fresh_inductor_cache

    torch._dynamo.reset()
    with fresh_inductor_cache():
        yield
    torch._dynamo.reset()


def provenance(device: torch.device, clis: dict[str, StudentCLI]) -> dict[str, Any]:
    """Collect where the figures come from: versions, machine and seed."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        **package_versions("modiff", "torch", "lightning", "diffusers", "numpy"),
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": has_vnni(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": next(iter(clis.values())).config.seed,
    }


def has_vnni() -> bool | None:
    """Whether the CPU adds four int8 products at once without saturating; None where nothing says so."""
    info = Path("/proc/cpuinfo")
    return "vnni" in info.read_text() if info.is_file() else None


def finish(run: RunDirectory, content: dict[str, Any]) -> None:
    """Write JSON, Markdown and the plot, then print the result."""
    from rich.console import Console

    folder = run.path
    bench_plot(content, folder / "bench.png")
    write_text(folder / "bench.md", markdown(content))
    write_json(folder / "bench.json", content)
    run.mark("complete")
    Console(width=None).print(terminal_table(content))
    for sentence in content["summary"]:
        print(sentence)
    print(f"Results: {folder / 'bench.md'}, {folder / 'bench.json'}, {folder / 'bench.png'}")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trainer(cli: StudentCLI) -> Trainer:
    """Lightning's choice of device and precision."""
    if cli.config_init.trainer.devices in ("auto", None):
        cli.config_init.trainer.devices = 1
    trainer = cli.make_trainer([], logger=False, enable_checkpointing=False)
    if trainer.world_size > 1:
        raise ConfigError(f"modiff bench runs on one device, not {trainer.world_size}. Add --trainer.devices 1.")
    return trainer


def _student_facts(cli: StudentCLI, executed: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe": cli.recipe,
        "ckpt": cli.config.ckpt,
        "quantization": json.loads(json.dumps(cli.identity()["model"]["config"])),
        "executed": executed,
    }
