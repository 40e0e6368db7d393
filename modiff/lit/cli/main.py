"""The ``modiff`` command. It imports a subcommand only when it runs it, so that ``modiff --help`` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from modiff.lit.runs.signals import ignore_signals, leave_early

COMMANDS = {
    "evaluate": (
        "modiff.lit.commands.evaluate",
        "teacher against student from the same noise: metrics, pictures, report",
    ),
    "compare": (
        "modiff.lit.commands.compare",
        "several recipes against the same teacher images: one table, one picture",
    ),
    "bench": (
        "modiff.lit.commands.bench",
        "teacher against students: time by stage, compilation, memory; eager and compiled",
    ),
    "search": ("modiff.lit.commands.search", "the cheapest sampler, bits and reuse of blocks that keep a quality"),
    "quantize": ("modiff.lit.commands.quantize", "calibrate the student of a recipe and pack it into a folder"),
    "sample": (
        "modiff.lit.commands.evaluate",
        "draw images with the student, or without quantization with the teacher",
    ),
    "train": ("modiff.lit.commands.train", "train a small teacher, or the classifier that measures its images"),
    "dashboard": ("modiff.lit.commands.dashboard", "the W&B workspace and report of a project, or both as JSON"),
    "statistics": (
        "modiff.lit.commands.statistics",
        "feature statistics of real images, the reference of a Fréchet distance",
    ),
}

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def help_text() -> str:
    """The text of ``modiff --help``."""
    rows = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: modiff COMMAND --config RECIPE.yaml [--FIELD VALUE ...]

Quantize diffusion models without training, and measure what it costs.

commands:
{rows}

Every field of a recipe can be overridden by its dotted name:
  modiff evaluate --config recipes/mnist/w8a4_modiff.yaml --model.config.activation.bits 3 --num_images 256
  modiff compare recipes/mnist/w8a4_ptq.yaml recipes/mnist/w8a4_modiff.yaml
  modiff evaluate --help              all fields of a command
  modiff evaluate --config RECIPE.yaml --print_config    the recipe with every default filled in
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Its arguments; None: those of this process, which ends with the command. From then on it ignores the
            signals that ask a run to stop, because its exit status is decided.

    Returns:
        The exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted, 75 interrupted and to be requeued.
    """
    if argv is not None:
        return _run(list(argv), last=False)
    leave_early(next(iter(sys.argv[1:]), ""))
    try:
        return _run(sys.argv[1:], last=True)
    finally:
        ignore_signals()


def _run(args: list[str], last: bool) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"modiff {version('modiff')}")
        return 0
    command, *rest = args
    if command not in COMMANDS:
        print(f"modiff: unknown command {command!r}; allowed are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    for name in RANKS:  # Lightning reads them when it is imported
        if not os.environ.get(name, "0").isdecimal():
            print(f"modiff: {name} is {os.environ[name]!r}; allowed are whole numbers. Unset it.", file=sys.stderr)
            return 1
    # Where a rank is lost, PyTorch prints the stack of its C++ code; one line of ours says it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from modiff.lit.runs.endings import run_command

    return run_command(command, lambda: getattr(importlib.import_module(COMMANDS[command][0]), command)(rest), last)


if __name__ == "__main__":
    sys.exit(main())
