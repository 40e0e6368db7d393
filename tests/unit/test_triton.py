"""The Triton backend where there is no GPU: what it refuses and why, its tables, and what the compiler makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import modiff
from modiff.config.specs import QuantSpec
from modiff.errors import ConfigError
from modiff.kernels.backend import BACKENDS, OperatorShape, Quantizer
from modiff.kernels.triton import support, tables
from modiff.kernels.triton.tables import ARCHITECTURES, SHARED_PER_BLOCK, Blocks, Product, Table, table
from modiff.quantizers.affine import Limits
from modiff.quantizers.granularity import Partition

ROOT = Path(__file__).parents[2]
WEIGHT, SPEC = QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="sample")
needs_triton = pytest.mark.skipif(support.missing() is not None, reason=f"{support.missing()}")


def quantizer(spec: QuantSpec = SPEC) -> Quantizer:
    return Quantizer(spec, Partition(keep=(0,)), Limits.of(spec, torch.zeros(1)))


def conv(**changes: object) -> OperatorShape:
    usual = {"kernel": (3, 3), "stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    usual |= {"kind": "conv", "in_channels": 64, "out_channels": 64, "weight": WEIGHT}
    return OperatorShape(**{**usual, **changes})


@pytest.mark.parametrize(
    ("shape", "spec", "reason"),
    [
        (conv(in_channels=24), SPEC, "its 24 input channels are not a multiple of 16"),
        (conv(out_channels=3), SPEC, "its 3 output channels are not a multiple of 16"),
        (conv(groups=4), SPEC, "it has 4 groups, and the Triton kernels have no grouped convolution"),
        (conv(dilation=(2, 2)), SPEC, "the Triton kernels have no dilated convolution"),
        (conv(stride=(1, 2)), SPEC, "its stride (1, 2) is not the same in both directions"),
        (conv(padding_mode="circular"), SPEC, "borders are padded by 'circular', not by zeros"),
        (conv(kernel=(3, 3, 3)), SPEC, "there is no integer Conv3d"),
        (conv(kind="conv_transpose"), SPEC, "there is no integer transposed convolution on GPUs"),
        (conv(in_channels=16384, kernel=(3, 3)), SPEC, "its sums have 147456 terms; int32 holds fewer than 133144"),
        (
            OperatorShape("linear", 32768, 64, WEIGHT),
            QuantSpec(8, granularity="token"),
            "its tokens have 32768 channels; the range of at most 8192 is found at once",
        ),
    ],
)
def test_an_operator_that_no_kernel_computes_is_refused_with_the_reason(
    shape: OperatorShape, spec: QuantSpec, reason: str
) -> None:
    assert support.shape_obstacle(shape, quantizer(spec)) == reason


def test_usual_operators_have_no_obstacle() -> None:
    for shape in (conv(), conv(stride=(2, 2)), conv(kernel=(1, 1)), OperatorShape("linear", 1152, 4608, WEIGHT)):
        assert support.shape_obstacle(shape, quantizer()) is None


def test_a_student_on_the_cpu_says_that_the_kernels_need_cuda() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    config = modiff.QuantConfig(WEIGHT, SPEC, backend="triton")
    with pytest.raises(ConfigError, match="'triton' cannot run operator '0' exactly: triton runs on cuda, not on cpu"):
        modiff.quantize(model, config)


@pytest.mark.parametrize(
    ("capability", "available", "hip", "reason"),
    [
        ((7, 5), True, None, r"Some GPU has compute capability 7.5; the Triton kernels need 8.0 or later"),
        ((9, 0), False, None, "PyTorch finds no CUDA device"),
        ((9, 0), True, "6.4", "the Triton kernels are tuned for NVIDIA GPUs, and this PyTorch is built for AMD's"),
        ((9, 0), True, None, None),
    ],
)
def test_the_device_decides_first(
    capability: tuple[int, int], available: bool, hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(support, "missing", lambda: None)
    cuda = torch.device("cuda")
    assert BACKENDS["triton"].obstacle(conv(), quantizer(), cuda, torch.float32) == reason
    assert BACKENDS["triton"].obstacle(conv(), quantizer(), cuda, torch.float64) == "float64 models are simulated"


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "reason"),
    [
        ("2.10.1", "3.6.0", r"PyTorch 2.10.1 is too old for the Triton kernels; install 2.11 or later"),
        ("2.11.0+cu130", "3.5.1", "Triton 3.5.1 is too old; install 3.6 or later"),
        ("2.11.0+cu130", None, "Triton is not installed; CUDA builds of PyTorch for Linux bring it"),
        ("2.13.0", "3.9.0", None),
    ],
)
def test_versions_that_are_too_old_are_named(
    torch_version: str, triton_version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(support.util, "find_spec", lambda _: triton_version)
    monkeypatch.setattr(support.metadata, "version", lambda _: triton_version)
    assert support.missing.__wrapped__() == reason


def test_modiff_imports_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import modiff; print(modiff.describe.__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "describe"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_table_has_blocks_for_every_product_and_reads_as_it_is_written(architecture: str) -> None:
    found = table(architecture)
    assert Table.from_json(found.to_json()) == found
    for run in (32, 64, 96, 128, 960, 3456):
        for rows, columns in ((1, 16), (128, 512), (4096, 64), (131072, 256)):
            blocks = found.blocks(Product(rows, columns, 3 * run, run))
            assert run % blocks.depth == 0
            assert tables.COLUMN_PADDING % blocks.columns == 0


def test_measured_blocks_come_before_rules() -> None:
    product, blocks = Product(4096, 64, 576, 192), Blocks(64, 64, 64, 4, 3)
    found = Table("sm_90", table("sm_90").rules, {product: blocks}, device="Some GPU")
    assert found.blocks(product) == blocks
    assert found.blocks(Product(4096, 64, 64, 64)) != blocks
    assert blocks in found.every()


def test_a_table_whose_rules_end_too_early_says_so() -> None:
    with pytest.raises(ValueError, match="No rule of the table for sm_90 fits"):
        Table("sm_90", (), {}).blocks(Product(1, 16, 32, 32))


def proven(architecture: str, found: object) -> None:
    """Tensor cores for int8, nothing spilled, and at least one block on a multiprocessor."""
    from modiff.kernels.triton import proof

    assert isinstance(found, proof.Compiled)
    assert found.stack == 0, found
    assert found.shared <= SHARED_PER_BLOCK[architecture], found
    assert found.blocks_per_sm >= 1, found
    if not found.kernel.startswith(("quantize", "range")):
        assert any(re.search(proof.INSTRUCTION[architecture], name) for name in found.instructions), found
        assert found.matrix > 0, found


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_kernels_compile_for_gpus_that_are_not_there(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modiff.kernels.triton import launch, proof

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = table(architecture)
    product = proof.compile_product(architecture, "conv1", found.every()[0])
    proven(architecture, product)
    proven(architecture, proof.compile_quantize(found))
    if architecture == "sm_90":  # the same code for all: a float â, and a range of its own for each token
        proven(architecture, proof.compile_quantize(found, per=launch.TOKEN, held="fp32"))
    if architecture == "sm_90":
        assert product.blocks_per_sm == 2  # what hides that each wgmma is waited for


@pytest.mark.slow
@needs_triton
@pytest.mark.timeout(3600)  # 45 kernels, of some seconds each
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_in_the_tables_compiles(architecture: str) -> None:
    from modiff.kernels.triton import proof

    for found in proof.compile_table(table(architecture), thorough=True):
        proven(architecture, found)


@needs_triton
def test_the_page_shows_what_was_compiled_of_the_tables_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kernels

    results = json.loads(kernels.RESULTS.read_text())["kernels"]
    assert kernels.markdown(results) in kernels.PAGE.read_text(encoding="utf-8")
    for architecture, rows in results.items():
        assert {blocks.key for blocks in table(architecture).every()} <= {row["blocks"] for row in rows}
        assert all(row["stack"] == 0 for row in rows)


def interpret(*arguments: str) -> None:
    """Run tests of the interpreter in a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.timeout(1200)
def test_kernels_in_the_interpreter() -> None:
    """The tests of ``tests/interpreted`` that are not slow."""
    interpret("tests/interpreted")


@pytest.mark.slow
@needs_triton
@pytest.mark.timeout(3600)
def test_more_kernels_in_the_interpreter() -> None:
    interpret("tests/interpreted", "-m", "slow")
