"""Models without memory: tensors that no checkpoint holds are refused wherever they are; the way that works, works."""

from __future__ import annotations

import accelerate
import pytest
import torch
from torch import nn

import modiff
from modiff.errors import CheckpointError


class KeepsTensors(nn.Module):
    """Keeps frequencies in a plain attribute, as rotary embeddings do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        one = torch.linspace(0, 1, 8)
        self.kept = {"alone": one, "list": [one, one + 1], "dict": {"x": one}, "nested": [{"x": (one,)}]}[how]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept
        while not isinstance(kept, torch.Tensor):
            kept = next(iter(kept.values() if isinstance(kept, dict) else kept))
        return self.a(x + kept)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))


def run(student: nn.Module) -> torch.Tensor:
    with modiff.trajectory(student):
        student(X)
        return student(X * 0.9)


@pytest.mark.parametrize("how", ["alone", "list", "dict", "nested"])
def test_tensors_outside_of_the_state_dict(tmp_path, how) -> None:
    torch.manual_seed(0)
    student = modiff.quantize(KeepsTensors(how), "w4a8-modiff")
    expected = run(student)
    modiff.save(student, tmp_path / "s")
    with torch.device("meta"):
        lost = KeepsTensors(how)
    with pytest.raises(CheckpointError, match=r"kept is a tensor on the meta device.*accelerate\.init_empty_weights"):
        modiff.load(tmp_path / "s", lost)
    with accelerate.init_empty_weights():
        model = KeepsTensors(how)
    assert model.a.weight.is_meta
    assert torch.equal(run(modiff.load(tmp_path / "s", model)), expected)
