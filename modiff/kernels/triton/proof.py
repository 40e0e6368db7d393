"""What the compiler makes of each kernel, for GPUs that need not be there: instructions, registers, spills, memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modiff.kernels.triton import encoding, products
from modiff.kernels.triton.launch import FACTS, SAMPLE, TOKEN, block_of
from modiff.kernels.triton.tables import REGISTERS_PER_SM, SHARED_PER_SM, THREADS_PER_SM, Blocks, Table

CAPABILITY = {"sm_80": 80, "sm_89": 89, "sm_90": 90}
INSTRUCTION = {"sm_80": r"mma\.sync\S*\.s8", "sm_89": r"mma\.sync\S*\.s8", "sm_90": r"wgmma\S*\.s8"}
"""The tensor-core instruction that int8 products must use."""
_ALIGNED = [["tt.divisibility", 16]]
_ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+\S")
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled.

    Args:
        architecture: Such as ``sm_90``.
        kernel: Its name and variant.
        blocks: How it is cut.
        instructions: Tensor-core instructions for int8 in its PTX, each once.
        registers: Of a thread.
        stack: Bytes that a thread spills.
        shared: Bytes of shared memory of a block.
        threads: Of a block.
        loop: Machine instructions of the loop that holds the tensor-core instructions, else of the longest; 0: none.
        matrix: Tensor-core instructions among these.
    """

    architecture: str
    kernel: str
    blocks: str
    instructions: tuple[str, ...]
    registers: int
    stack: int
    shared: int
    threads: int
    loop: int
    matrix: int

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit a multiprocessor side by side."""
        allocated = -(-self.registers // 8) * 8 * self.threads
        by_memory = SHARED_PER_SM[self.architecture] // (self.shared + 1024)
        return min(REGISTERS_PER_SM // allocated, by_memory, THREADS_PER_SM[self.architecture] // self.threads)


def compile_kernel(
    architecture: str, kernel: Any, name: str, blocks: str, arguments: dict[str, Any], warps: int, stages: int
) -> Compiled:
    """Compile a kernel for an architecture and read what came out.

    Args:
        architecture: One of the tables'.
        kernel: A function of ``products`` or ``encoding``.
        name: For the report.
        blocks: Likewise.
        arguments: By name: a type such as ``*i8`` or ``i32`` (pointers and sizes are multiples of 16; ``i32:1`` is
            not), or a constant.
        warps: Of a block.
        stages: Of the pipeline.
    """
    signature, constants, attributes = {}, {}, {}
    for index, (key, value) in enumerate(arguments.items()):
        if not isinstance(value, str):
            signature[key], constants[(index,)] = "constexpr", value
            continue
        kind, _, loose = value.partition(":")
        signature[key] = kind
        if not loose and (kind.startswith("*") or kind == "i32"):
            attributes[(index,)] = _ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, **FACTS}
    found = triton.compile(source, target=GPUTarget("cuda", CAPABILITY[architecture], 32), options=options)
    registers, stack, sass = _disassemble(found.asm["cubin"])
    loop, matrix = _main_loop(sass)
    used = tuple(sorted(set(re.findall(r"(?:wgmma|mma\.sync)\S*s8\S*", found.asm["ptx"]))))
    return Compiled(architecture, name, blocks, used, registers, stack, found.metadata.shared, warps * 32, loop, matrix)


def compile_product(architecture: str, kind: str, blocks: Blocks, output: str = "fp16", adds: bool = True) -> Compiled:
    """A product: ``gemm``, or ``conv1`` and ``conv2`` by stride.

    Args:
        architecture: One of the tables'.
        kind: See above.
        blocks: How it is cut.
        output: Type of ô.
        adds: To ô, as modulated operators do; else with a bias instead.
    """
    operands = {
        "codes": "*i8",
        "weight": "*i8",
        "bias": None if adds else "*fp32",
        "code_scale": "*fp32",
        "weight_scale": "*fp32",
        "output": f"*{output}",
        "rows": "i32",
        "columns": "i32",
    }
    sizes = {"depth": "i32"}
    constants: dict[str, Any] = {}
    if kind != "gemm":
        sizes = dict.fromkeys(("height", "width", "padded_height", "padded_width"), "i32:1")
        sizes |= {"channels": "i32", "kernel_height": "i32:1", "run": "i32"}
        constants = {"STRIDE": int(kind[-1])}
    constants |= {"GROUP": blocks.group, "ADDS": adds, "SUMS": False, "PARTS": blocks.parts}
    constants |= {"BLOCK_M": blocks.rows, "BLOCK_N": blocks.columns, "BLOCK_K": blocks.depth}
    kernel = products.gemm_kernel if kind == "gemm" else products.conv_kernel
    name = f"{kind}, {'ô' if adds else 'output'} {output}"
    # Triton makes a constant of every 1; a Linear's tokens each have a scale.
    arguments = {**operands, **sizes, "rows_per_scale": 1 if kind == "gemm" else "i32", **constants}
    return compile_kernel(architecture, kernel, name, blocks.key, arguments, blocks.warps, blocks.stages)


def compile_quantize(
    table: Table, norm: str = "none", per: int = SAMPLE, held: str = "i16", channels: int = 256
) -> Compiled:
    """The pass that makes codes of fp16 inputs.

    Args:
        table: Of an architecture.
        norm: ``none``, ``group`` (with SiLU) or ``layer``.
        per: :data:`~modiff.kernels.triton.launch.SAMPLE` or ``TOKEN``.
        held: Type of â.
        channels: Of the input.
    """
    rows, columns = block_of(channels, table.elements, per == TOKEN or norm == "layer")
    grid = "*fp32" if held == "i16" else None
    of_group, of_norm = ("*fp32" if norm == "group" else None), ("*fp32" if norm != "none" else None)
    arguments: dict[str, Any] = {"a": "*fp16", "held": f"*{held}", "codes": "*i8"}
    arguments |= {"lows": "*fp32", "highs": "*fp32", "probes": "*fp32", "scale": "*fp32"}
    arguments |= dict.fromkeys(("zero", "units", "known", "again", "before"))
    arguments |= {"step": grid, "center": grid, "mean": of_group, "rstd": of_group, "mul": of_norm, "add": of_norm}
    arguments |= {"offset": of_group}
    arguments |= dict.fromkeys(("height", "width", "top_pad", "left_pad", "padded_height", "padded_width"), "i32:1")
    if per == TOKEN:  # of a Linear: one row of pixels, and constants for all that is 1
        arguments |= {"height": 1, "padded_height": 1}
    arguments |= {"channels": "i32", "padded_channels": "i32", "a_row": "i32", "a_channel": 1}
    arguments |= {"held_row": "i32", "held_channel": 1, "affine_sample": "i32"}
    arguments |= {"group_size": "i32:1", "epsilon": "fp32"}
    arguments |= {"highest": "fp32", "clip": "fp32", "factor": "fp32", "PER": per, "SYMMETRIC": True, "CLIPS": True}
    arguments |= {"COMPENSATES": True, "MEASURES": False, "NORM": ("none", "group", "layer").index(norm)}
    arguments |= {"ACTIVATION": int(norm == "group"), "AGAIN": False, "BLOCK_R": rows, "BLOCK_C": columns}
    name = f"quantize{'' if norm == 'none' else ' after ' + norm + ' norm'}{', per token' if per == TOKEN else ''}"
    shape = f"{rows}x{columns}, {table.warps} warps"
    return compile_kernel(
        table.architecture, encoding.quantize_kernel, f"{name}, â {held}", shape, arguments, table.warps, 3
    )


def compile_range(table: Table, norm: str = "none", per_channel: bool = False, channels: int = 256) -> Compiled:
    """The pass that finds ranges of the residual of fp16 inputs, with an int16 â; see :func:`compile_quantize`."""
    rows, columns = block_of(channels, table.elements, whole_rows=norm == "layer")
    of_group, of_norm = ("*fp32" if norm == "group" else None), ("*fp32" if norm != "none" else None)
    arguments: dict[str, Any] = {"a": "*fp16", "held": "*i16", "lows": "*fp32", "highs": "*fp32"}
    arguments |= {"step": "*fp32", "center": "*fp32", "mean": of_group, "rstd": of_group, "mul": of_norm}
    arguments |= {"add": of_norm, "offset": of_group, "rows": "i32:1", "channels": "i32", "a_row": "i32"}
    arguments |= {"a_channel": 1, "held_row": "i32", "held_channel": 1, "affine_sample": "i32"}
    arguments |= {"group_size": "i32:1", "epsilon": "fp32", "PER_CHANNEL": per_channel}
    arguments |= {"NORM": ("none", "group", "layer").index(norm), "ACTIVATION": int(norm == "group")}
    arguments |= {"BLOCK_R": rows, "BLOCK_C": columns, "REPEATS": 4}
    shape = f"{rows}x{columns}, {table.warps} warps"
    name = f"range{' per channel' if per_channel else ''}{'' if norm == 'none' else ' after ' + norm + ' norm'}, â i16"
    return compile_kernel(table.architecture, encoding.range_kernel, name, shape, arguments, table.warps, 3)


def compile_table(table: Table, thorough: bool = False) -> Iterator[Compiled]:
    """All blocks that the table of an architecture may launch, in the variants that use most registers.

    Args:
        table: Of an architecture.
        thorough: Linears with every blocks too, and the pass that makes codes with both kinds of â.
    """
    architecture, every = table.architecture, table.every()
    for blocks in every:
        yield compile_product(architecture, "conv1", blocks, "fp32")
    for blocks in every if thorough else every[:1]:
        yield compile_product(architecture, "gemm", blocks, "fp32")
    for kind in ("gemm", "conv1", "conv2"):
        yield compile_product(architecture, kind, every[0], "fp16")
    yield compile_product(architecture, "conv1", every[0], "fp32", adds=False)
    for held in ("i16", "fp32") if thorough else ("i16",):
        yield compile_quantize(table, held=held)
        yield compile_quantize(table, "group", held=held)
        yield compile_quantize(table, "none", TOKEN, held)
        yield compile_quantize(table, "layer", TOKEN, held, channels=1152)
    yield compile_range(table)
    yield compile_range(table, "group", per_channel=True)
    yield compile_range(table, "layer", channels=1152)


def _disassemble(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack, and the lines of machine instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (_cuobjdump(option, path) for option in ("-res-usage", "-sass"))
    registers, stack = (re.search(rf"{key}:(\d+)", usage) for key in ("REG", "STACK"))
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage!r}")
    return int(registers[1]), int(stack[1]), [line for line in sass.splitlines() if _ADDRESS.search(line)]


def _cuobjdump(option: str, path: Path) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _main_loop(sass: list[str]) -> tuple[int, int]:
    """Length of the loop with the most tensor-core instructions, and how many these are."""
    index = {}
    for i, line in enumerate(sass):
        found = _ADDRESS.search(line)
        assert found is not None
        index[int(found[1], 16)] = i
    loops = [(0, 0)]
    for end, line in enumerate(sass):
        branch = _BRANCH.search(line)
        begin = index.get(int(branch[1], 16), end) if branch else end
        if begin < end:
            body = sass[begin : end + 1]
            loops.append((sum("MMA" in each for each in body), len(body)))
    matrix, length = max(loops)
    return length, matrix
