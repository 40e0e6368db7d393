"""``benchmarks/gpu.py check`` in the interpreter, and the command that tunes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modiff.kernels.triton import tune
from modiff.kernels.triton.launch import INTERPRETER_BLOCKS, table_for
from modiff.kernels.triton.tables import Product

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


class Small(nn.Module):
    """Two products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + self.time(t)[:, :, None, None]


def test_check_finds_every_product_exact(tmp_path: Path) -> None:
    import gpu

    model = gpu.Model("small", Small, lambda n: {"x": torch.randn(n, 32, 4, 4), "t": torch.randn(n, 32)}, 2)
    assert gpu.main(["check", "--device", "cpu", "--size", "64", "--output", str(tmp_path)], [model]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert [row["exact"] for row in found["exact"]] == [True, True]
    assert found["ceilings"]["copy_gb_per_s"] > 0


def test_tuning_keeps_what_is_exact_and_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, product = torch.device("cpu"), Product(rows=40, columns=32, depth=64, run=64)
    others = tune.candidates(product)[:2]
    monkeypatch.setattr(tune, "candidates", lambda _: others)
    monkeypatch.setattr(tune, "microseconds", lambda _, blocks, __: 1.0 if blocks == others[1] else 2.0)
    found, rows = tune.tune([product], cpu, table_for(cpu))
    assert found.blocks(product) == others[1] != INTERPRETER_BLOCKS
    assert rows[0]["microseconds"] == 1.0
    assert rows[0]["by_rule"] == 2.0
    monkeypatch.setattr(tune, "check", lambda *_: False)
    with pytest.raises(RuntimeError, match="No blocks give the exact sums"):
        tune.tune([product], cpu, table_for(cpu))


def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main(["64x32x64"]) == 1
    assert "Nothing can be tuned here: PyTorch finds no CUDA device" in capsys.readouterr().err
