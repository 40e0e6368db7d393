"""``benchmarks/gpu.py`` on the CPU: its logic runs, with a small model and without a GPU's numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


class Small(nn.Module):
    """Called as diffusers' denoisers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.time, self.out = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 32), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(nn.functional.silu(self.conv(x) + self.time(t)[:, :, None, None]))


@pytest.fixture
def gpu() -> ModuleType:
    import gpu as module

    return module


def small(gpu: ModuleType) -> object:
    return gpu.Model("small", Small, lambda n: {"x": torch.randn(n, 32, 4, 4), "t": torch.randn(n, 32)}, 2)


def test_bench_writes_every_arm_and_the_table(gpu: ModuleType, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--rounds", "1", "--repeats", "2", "--images", "1", "--steps", "2"]
    assert gpu.main(["bench", "--output", str(tmp_path), *options], [small(gpu)]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["arm"] for row in found["rows"]] == [*gpu.ARMS]
    assert all(row["ms_per_evaluation"] > 0 for row in found["rows"])
    assert set(found["psnr_db"]) == {"modulated, here", "plain, here", "modulated, simulated on the CPU"}
    table = (tmp_path / "bench.md").read_text()
    assert table.startswith("CPU (dry run)")
    assert table.count("\n| small, 2 |") == len(gpu.ARMS)
    assert "1.00x" in table


def test_an_arm_that_fails_leaves_the_others(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *rest: object) -> dict[str, object]:
        if name == "W8A8 modulated":
            raise RuntimeError("out of memory")
        return {"ms_per_evaluation": 2.0, "peak_mib": None, "backends": {}}

    monkeypatch.setattr(gpu, "time_arm", broken)
    monkeypatch.setattr(gpu, "quality", lambda *_: {"modulated, here": 40.0})
    assert gpu.main(["bench", "--output", str(tmp_path), "--device", "cpu"], [small(gpu)]) == 0
    table = (tmp_path / "bench.md").read_text()
    assert "failed: RuntimeError: out of memory" in table
    assert table.count("2.00 |") == len(gpu.ARMS) - 1


def test_it_says_that_there_is_no_gpu(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["check"])
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
