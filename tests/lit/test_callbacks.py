"""The callbacks of an evaluation: memory, counts, errors along the trajectory, cost."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import modiff
from modiff.errors import ConfigError, TrajectoryError
from modiff.lit.callbacks import activation_cache
from modiff.lit.callbacks.activation_cache import ActivationCache, free_mib
from modiff.lit.callbacks.cost import Cost
from modiff.lit.callbacks.trajectory_errors import measure
from modiff.lit.modules.student import LitStudent
from modiff.metrics.pairwise import mean_relative_l2
from modiff.teachers.zoo import TeacherSpec
from modiff.trajectory.session import state_of

BATCH = {"index": torch.arange(2), "valid": torch.ones(2, dtype=torch.bool)}
TRAINER = SimpleNamespace(
    is_global_zero=True,
    datamodule=SimpleNamespace(batch_size=2),
    callbacks=[],
    precision_plugin=SimpleNamespace(forward_context=nullcontext),
)


@pytest.fixture
def student(tiny_teacher):
    """Makes a module of the tiny teacher."""

    def make(preset: str = "w8a4-modiff-paper", **options) -> LitStudent:
        module = LitStudent(TeacherSpec(path=str(tiny_teacher)), preset=preset, steps=3, **options)
        module.configure_model()
        return module

    return make


def run_batch(cache: ActivationCache, module: LitStudent) -> dict:
    cache.on_test_batch_start(TRAINER, module, BATCH)
    images = module.denoise(module.student, BATCH["index"])
    outputs = {"student": images, **BATCH, "facts": {}}
    cache.on_test_batch_end(TRAINER, module, outputs)
    return outputs


def test_batch_that_does_not_fit_is_refused_with_one_that_does(student, monkeypatch) -> None:
    module, cache = student(), ActivationCache()
    per_image = modiff.cost(module.student, torch.zeros(1, 1, 8, 8), 0).state_mib_per_image
    monkeypatch.setattr(activation_cache, "free_mib", lambda device: 1.5 * per_image)
    with pytest.raises(
        ConfigError, match=r"The state of a batch of 2 needs .* GiB, free .* GiB: use batch 1 \(--data.ba"
    ):
        cache.on_test_batch_start(TRAINER, module, BATCH)
    assert state_of(module.student).trajectory is None
    assert cache.state_mib_per_image == per_image
    monkeypatch.setattr(activation_cache, "free_mib", lambda device: 2.5 * per_image)
    run_batch(cache, module)


def test_not_even_one_image_fits(student, monkeypatch) -> None:
    module, cache = student(), ActivationCache()
    monkeypatch.setattr(activation_cache, "free_mib", lambda device: 1e-6)
    with pytest.raises(ConfigError, match="not even one image fits"):
        cache.on_test_batch_start(TRAINER, module, BATCH)


def test_free_memory_is_a_plausible_number_of_mib() -> None:
    assert 16 < free_mib(torch.device("cpu")) < 2**30


@pytest.mark.parametrize(
    ("preset", "quantized"), [("w8a4-modiff-paper", 2), ("w8a4-ptq-paper", 3), ("w8a32-modiff", 0)]
)
def test_invariant_2_counts_of_a_batch(student, preset, quantized) -> None:
    module, cache = student(preset), ActivationCache()
    outputs = run_batch(cache, module)
    assert outputs["facts"] == {"evaluations": 3, "quantized": quantized, "reused": 0}
    assert module.result.evaluations == {"total": 3, "quantized": quantized}


def test_invariant_2_second_batch_does_not_see_the_first(student) -> None:
    module, cache = student(), ActivationCache()
    first, second = run_batch(cache, module), run_batch(cache, module)
    assert torch.equal(first["student"], second["student"])
    assert state_of(module.student).trajectory is None


def test_state_is_cleared_when_a_batch_fails(student) -> None:
    module, cache = student(), ActivationCache()
    cache.on_test_batch_start(TRAINER, module, BATCH)
    module.student(module.noise(BATCH["index"]), 0)
    assert state_of(module.student).trajectory.caches
    cache.on_exception(TRAINER, module, KeyboardInterrupt())
    assert state_of(module.student).trajectory is None
    run_batch(cache, module)


def test_failing_batch_keeps_its_own_error_even_with_nan(student) -> None:
    module, cache = student(), ActivationCache()
    cache.on_test_batch_start(TRAINER, module, BATCH)
    module.student(torch.full((2, 1, 8, 8), float("nan")), 0)
    cache.on_exception(TRAINER, module, RuntimeError("the first error"))
    assert state_of(module.student).trajectory is None


@pytest.mark.parametrize("ends", ["teardown", "on_exception"])
def test_products_on_a_gpu_are_float32_while_images_are_drawn(ends, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cache = ActivationCache()
    cache.setup()
    cache.setup()  # of the next stage
    assert torch.backends.cudnn.allow_tf32 is False
    getattr(cache, ends)(None, None, ValueError())
    assert torch.backends.cudnn.allow_tf32 is True
    cache.teardown()
    assert torch.backends.cudnn.allow_tf32 is True


def test_batches_of_different_length_are_refused(student) -> None:
    module, cache = student(), ActivationCache()
    run_batch(cache, module)
    module.steps = 4
    with pytest.raises(TrajectoryError, match=r"differ in evaluations \(total, quantized\): \(3, 2\) and \(4, 3\)"):
        run_batch(cache, module)


def test_errors_are_zero_without_quantization(student) -> None:
    errors = measure(student("w32a32-ptq"), 2)
    assert len(errors["timesteps"]) == 3
    assert errors["timesteps"] == sorted(errors["timesteps"], reverse=True)
    assert max(errors["sample_error"]) == 0
    assert all(value == 0 for row in errors["operator_error"] for value in row)


def test_errors_grow_with_fewer_bits(student) -> None:
    last = [measure(student(f"w8a{bits}-ptq"), 2)["sample_error"][-1] for bits in (8, 4, 2)]
    assert 0 < last[0] < last[1] < last[2]


def test_errors_name_every_operator(student) -> None:
    module = student()
    errors = measure(module, 1)
    quantized = [row.name for row in modiff.describe(module.student) if row.skipped is None]
    assert errors["operators"] == quantized
    assert len(errors["operator_error"]) == len(quantized)
    assert errors["sample_error"][0] == 0  # both start from the same noise
    assert not any(m._forward_hooks for n, m in module.teacher.named_modules() if n in quantized)


class Shared(torch.nn.Module):
    """One Linear, called twice in each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, timestep):
        return SimpleNamespace(sample=self.linear(self.linear(x).tanh()))


def test_shared_operators_are_compared_call_by_call(student) -> None:
    module = student()
    torch.manual_seed(0)
    module.teacher = Shared().eval().requires_grad_(False)
    shared = Shared().eval().requires_grad_(False)
    shared.load_state_dict(module.teacher.state_dict())
    module.student = modiff.quantize(shared, modiff.QuantConfig.preset("w32a32-modiff"))
    assert max(measure(module, 2)["operator_error"][0]) == 0


def test_relative_l2_of_silence() -> None:
    zeros = torch.zeros(2, 3)
    assert mean_relative_l2(zeros, zeros) == 0
    assert mean_relative_l2(torch.full((2, 3), 2.0), torch.ones(2, 3)) == pytest.approx(1)


def test_costs_are_those_of_modiff_cost(student) -> None:
    module = student()
    module.result.evaluations = {"total": 3, "quantized": 2}
    Cost(rounds=1, evaluations=1).on_test_epoch_end(TRAINER, module)
    x = torch.zeros(1, 1, 8, 8)
    expected, teacher = modiff.cost(module.student, x, 0, evaluations=3), modiff.cost(module.teacher, x, 0)
    assert module.result.cost == {
        "gbops_per_evaluation": expected.gbops_per_evaluation,
        "teacher_gbops_per_evaluation": teacher.gbops_per_evaluation,
        "container_gbops_per_evaluation": expected.container_gbops_per_evaluation,
        "other_gbops_per_evaluation": expected.other_bops / 1e9,
        "weight_mib": expected.weight_mib,
        "teacher_weight_mib": teacher.weight_mib,
        "other_weight_mib": expected.other_weight_bytes / 2**20,
        "state_mib_per_image": expected.state_mib_per_image,
    }
    assert expected.gbops_per_evaluation < teacher.gbops_per_evaluation
    timing = module.result.timing
    seconds = timing["seconds_per_image_evaluation"]
    assert timing["time_ratio"] == seconds["student"] / seconds["teacher"]
    assert [row["name"] for row in module.result.operators] == [row.name for row in expected.operators]
    assert sum(row["state_mib"] for row in module.result.operators) == pytest.approx(expected.state_mib_per_image)
    held, costs = module.result.operators, module.result.cost
    assert sum(row["weight_mib"] for row in held) + costs["other_weight_mib"] == pytest.approx(expected.weight_mib)
    total = sum(row["gbops"] for row in held) + costs["other_gbops_per_evaluation"]
    assert total == pytest.approx(costs["gbops_per_evaluation"])
