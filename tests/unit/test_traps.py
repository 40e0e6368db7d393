"""The traps of docs/method.md that other implementations fell into.

Each trap has a check, which passes, and is then built in on purpose, upon which the same check must fail. (Trap 5 is in
tests/property/test_quantizers.py, trap 8 is invariant 5.)
"""

import pytest
import torch
from small_models import noise, run, student

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.kernels.backend import BACKENDS
from modiff.kernels.float import FloatBackend
from modiff.operators.modulated import ModulatedOperator
from modiff.quantizers.granularity import Partition
from modiff.trajectory.contexts import Trajectory
from modiff.trajectory.session import ModulationState

fails = pytest.raises(AssertionError)


def check_activations_are_quantized():
    """Trap 1: at 2 bits outputs differ from those with full-precision activations, in all but the first evaluation."""
    inputs = noise(6)
    outputs, counts = run(student("w8a2-modiff-paper"), inputs)
    full, _ = run(student("w8a32-modiff"), inputs)
    assert counts.quantized == counts.total - 1 == 5
    differences = [float((o - f).norm() / f.norm()) for o, f in zip(outputs, full, strict=True)]
    assert differences[0] < 1e-6
    assert min(differences[1:]) > 1e-3


def test_trap_1_state_is_kept_from_step_to_step():
    check_activations_are_quantized()


def test_trap_1_built_in_state_reset_inside_the_loop(monkeypatch):
    original = ModulationState.next_cache

    def forgetful(self, name, x, batched):
        found = original(self, name, x, batched)
        if found is not None:
            self.trajectory.caches[name].clear()

    monkeypatch.setattr(ModulationState, "next_cache", forgetful)
    with fails:
        check_activations_are_quantized()


def check_trajectories_are_independent():
    """Trap 2: the same trajectory twice, another one between."""
    model = student()
    first, _ = run(model, noise(4, seed=1))
    run(model, noise(4, seed=2))
    again, counts = run(model, noise(4, seed=1))
    assert counts.total == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_trap_2_state_is_reset_between_batches():
    check_trajectories_are_independent()


def test_trap_2_built_in_state_kept_between_batches(monkeypatch):
    kept = {}
    original = Trajectory.begin

    def stale(self, call=None):
        original(self, call)
        if self.current.caches is not kept:
            self.current.caches = kept
            self.current.total = 1 if kept else 0
            self.current.calls = {name: len(caches) for name, caches in kept.items()} or None

    monkeypatch.setattr(Trajectory, "begin", stale)
    with fails:
        check_trajectories_are_independent()


def check_no_hidden_refresh():
    """Trap 3: over 30 evaluations the error is never that of full-precision activations but in the first."""
    inputs = noise(30)
    outputs, counts = run(student("w8a2-modiff-paper"), inputs)
    full, _ = run(student("w8a32-modiff"), inputs)
    assert counts.quantized == 29
    exact = [i for i, (o, f) in enumerate(zip(outputs, full, strict=True)) if (o - f).norm() < 1e-5 * f.norm()]
    assert exact == [0]


def test_trap_3_refreshes_are_asked_for_and_counted():
    check_no_hidden_refresh()
    _, counts = run(student("w8a2-modiff-paper", refresh_every=10), noise(30))
    assert (counts.total, counts.quantized) == (30, 27)


def test_trap_3_built_in_hidden_refresh_that_is_counted_as_quantized(monkeypatch):
    advance, note = ModulatedOperator.advance, ModulationState.note

    def refreshing(self, a, x, cache):
        if self.state.trajectory.total % 10:
            return advance(self, a, x, cache)
        monkeypatch.setattr(ModulationState, "note", lambda s, name, probe, quantized: note(s, name, probe, True))
        output = self.full(a, cache)
        monkeypatch.setattr(ModulationState, "note", note)
        return output

    monkeypatch.setattr(ModulatedOperator, "advance", refreshing)
    with fails:
        check_no_hidden_refresh()


SETS = {  # scales of an input [2, 3, 4, 4] of a convolution
    "tensor": (1, 1, 1, 1),
    "sample": (2, 1, 1, 1),
    "channel": (1, 3, 1, 1),
    "sample_channel": (2, 3, 1, 1),
}


def check_granularities_keep_what_they_are_named_for():
    """Trap 4: which scales exist, and which neighbours in the batch an image depends on."""
    from modiff.quantizers import granularity

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for name, shape in SETS.items():
        partition = granularity.activation_partition(QuantSpec(4, name), 4, "conv")
        assert tuple(partition.range(x)[1].shape) == shape, name
    other = torch.cat([x[:1], 10 * x[1:]])
    for name, alone in {"tensor": False, "channel": False, "sample": True, "sample_channel": True}.items():
        model = modiff.quantize(conv(), QuantConfig(None, QuantSpec(4, name), None))
        with torch.no_grad():
            assert torch.equal(model(x)[0], model(other)[0]) == alone, name


def conv():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))


def test_trap_4_granularities_are_named_by_what_keeps_its_own_scale():
    check_granularities_keep_what_they_are_named_for()


@pytest.mark.parametrize("wrong", [Partition(keep=(0,)), Partition(keep=(0, 1))])
def test_trap_4_built_in_channel_that_is_per_image(monkeypatch, wrong):
    from modiff.operators import quantized
    from modiff.quantizers import granularity

    right = granularity.activation_partition

    def partition(spec, *args, **kwargs):
        return wrong if spec.granularity == "channel" else right(spec, *args, **kwargs)

    monkeypatch.setattr(granularity, "activation_partition", partition)
    monkeypatch.setattr(quantized, "activation_partition", partition)
    with fails:
        check_granularities_keep_what_they_are_named_for()


def check_bias_enters_once():
    """Trap 12: with a large bias and a small weight, outputs stay near the bias."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(0.01)
            layer.bias.fill_(5.0)
    for modulation in (Modulation(), Modulation(warmup="refine"), Modulation(refresh_every=3)):
        modiff.quantize(model, QuantConfig(None, QuantSpec(8, "sample"), modulation))
        outputs, _ = run(model, [(torch.randn(2, 4),) for _ in range(8)])
        modiff.restore(model)
        assert all(((o - 5).abs() < 1).all() for o in outputs)


def test_trap_12_bias_enters_in_the_first_evaluation_only():
    check_bias_enters_once()


def test_trap_12_built_in_bias_added_at_every_step(monkeypatch):
    multiply = BACKENDS["simulate"].multiply
    monkeypatch.setattr(FloatBackend, "multiply", lambda self, prepared, encoded: 5 + multiply(prepared, encoded))
    with fails:
        check_bias_enters_once()


def check_state_outlives_inference_mode():
    """Trap 12: a trajectory whose evaluations run in and out of inference mode, with equal results."""
    inputs = noise(4)
    expected, _ = run(student(), inputs)
    model = student()
    with modiff.trajectory(model) as counts:
        outputs = []
        for i, args in enumerate(inputs):
            with torch.inference_mode(i % 2 == 0):
                outputs.append(model(*args).clone())
        caches = [cache for caches in counts.caches.values() for cache in caches]
        assert not any(t.is_inference() for cache in caches for t in (cache.a_hat, cache.o_hat))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_trap_12_no_inference_tensors_are_kept_as_state():
    check_state_outlives_inference_mode()


def test_trap_12_built_in_inference_tensors_as_state(monkeypatch):
    monkeypatch.setattr("modiff.operators.modulated.dense_like", lambda x, dtype: torch.empty_like(x, dtype=dtype))
    with pytest.raises((AssertionError, RuntimeError), match="assert|[Ii]nference"):
        check_state_outlives_inference_mode()


def test_trap_12_a_first_forward_calibrates_nothing():
    """Weights, specs and outputs of the next trajectory are the same whether or not another input came before."""
    fresh, used = student("w8a4-ptq-paper"), student("w8a4-ptq-paper")
    with torch.no_grad():
        used(100 * torch.randn(2, 3, 8, 8), torch.randn(2, 4))
    args = noise(1)[0]
    with torch.no_grad():
        assert torch.equal(fresh(*args), used(*args))
