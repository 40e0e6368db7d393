"""What the compiler makes of the Triton kernels: ``benchmarks/kernels.json`` and the tables of ``docs/kernels.md``.

It needs Triton and no GPU: ``python benchmarks/kernels.py`` compiles everything that the tuned tables may launch, for
every architecture, in a few minutes; ``--architectures sm_90`` one of them, keeping the others' results.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import triton

from modiff.kernels.triton import proof
from modiff.kernels.triton.tables import ARCHITECTURES, table

HERE = Path(__file__).parent
RESULTS = HERE / "kernels.json"
PAGE = HERE.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels: begin -->", "<!-- kernels: end -->"


def measure(architecture: str) -> list[dict[str, object]]:
    """One row for each kernel, printed as it comes."""
    rows = []
    for found in proof.compile_table(table(architecture)):
        row = {**asdict(found), "blocks_per_sm": found.blocks_per_sm}
        print(architecture, found.kernel, found.blocks, found.registers, found.stack, found.shared, flush=True)
        rows.append(row)
    return rows


def markdown(results: dict[str, list[dict[str, object]]]) -> str:
    """The tables of all architectures."""
    lines = []
    for architecture, rows in results.items():
        lines += [
            f"### {architecture}",
            "",
            "| kernel | blocks | instruction | registers | spilled bytes | shared KiB | blocks per SM | main loop |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            used = ", ".join(f"`{short(name)}`" for name in row["instructions"]) or "-"  # type: ignore[attr-defined]
            loop = f"{row['loop']}, {row['matrix']} of them products" if row["matrix"] else "-"
            lines.append(
                f"| {row['kernel']} | {row['blocks']} | {used} | {row['registers']} | {row['stack']} | "
                f"{int(str(row['shared'])) / 1024:g} | {row['blocks_per_sm']} | {loop} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


def short(instruction: str) -> str:
    """An instruction without what all of them have.

    >>> short("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8")
    'wgmma m64n128k32 s32.s8.s8'
    """
    name, shape = instruction.split(".")[0], next(p for p in instruction.split(".") if p[0] == "m" and p[1].isdigit())
    kinds = [p for p in instruction.split(".") if p in ("s32", "s8")]
    return f"{name} {shape} {'.'.join(kinds[:3])}"


def write(results: dict[str, list[dict[str, object]]]) -> None:
    """The JSON file, and the part of the page between its marks."""
    RESULTS.write_text(json.dumps({"triton": triton.__version__, "kernels": results}, indent=1) + "\n")
    if PAGE.exists():
        page = PAGE.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        tail = rest.split(END)[1]
        PAGE.write_text(f"{head}{BEGIN}\n{markdown(results)}\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Compile, and write after each architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    wanted = parser.parse_args().architectures
    results = json.loads(RESULTS.read_text())["kernels"] if RESULTS.exists() else {}
    for architecture in wanted:
        results[architecture] = measure(architecture)
        write({name: results[name] for name in ARCHITECTURES if name in results})


if __name__ == "__main__":
    main()
