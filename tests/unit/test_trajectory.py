"""The state of a student: who owns it, when it is refused, what is counted and found."""

import copy
import pickle
import weakref

import pytest
import torch
from small_models import Denoiser, config, denoiser, drift, noise, run, student
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.errors import ModiffError, TrajectoryError
from modiff.kernels import scratch
from modiff.operators.reference import ReferenceOperator

ARGS = noise(1)[0]


def test_a_modulated_operator_outside_a_trajectory_is_refused():
    with pytest.raises(
        TrajectoryError, match=r"'conv_in' was called outside a trajectory: .*`with modiff.trajectory\(student\):`"
    ):
        student()(*ARGS)


def test_a_modulated_operator_called_past_its_student_is_refused():
    model = student()
    with modiff.trajectory(model), pytest.raises(TrajectoryError, match="'conv_in' was called outside its student"):
        model.conv_in(ARGS[0])


def test_plain_operators_need_no_trajectory():
    model, inputs = student("w8a4-ptq-paper"), noise(2)
    inside, _ = run(model, inputs)
    with torch.no_grad():
        assert all(torch.equal(model(*args), o) for args, o in zip(inputs, inside, strict=True))


def test_a_batch_shape_change_inside_is_refused():
    model = student()
    with modiff.trajectory(model):
        model(*ARGS)
        with pytest.raises(
            TrajectoryError, match=r"'conv_in' has shape \[3, 3, 8, 8\] in evaluation 1, but had \[2, 3, 8, 8\] in the"
        ):
            model(*noise(1, batch=3)[0])


def test_nested_and_concurrent_trajectories_are_refused_and_the_open_one_goes_on():
    model, inputs = student(), noise(3)
    expected, _ = run(student(), inputs)
    with modiff.trajectory(model) as counts:
        first = model(*inputs[0])
        with (
            pytest.raises(TrajectoryError, match=r"already open on this student.*Close it first.*have a deepcopy each"),
            modiff.trajectory(model),
        ):
            pass
        outputs = [first, *(model(*args) for args in inputs[1:])]
    assert counts.total == 3
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def test_two_students_have_trajectories_of_their_own():
    a, b, inputs = student(), student("w8a2-modiff-paper"), noise(3)
    expected = run(student(), inputs)[0][-1]
    with modiff.trajectory(a), modiff.trajectory(b):
        for args in inputs:
            output = a(*args)
            b(*args)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("copied or pickled", copy.deepcopy),
        ("copied or pickled", pickle.dumps),
        ("moved or cast", lambda model: model.to(torch.bfloat16)),
        ("moved or cast", lambda model: model.cpu()),
        ("restored", modiff.restore),
        ("loaded into", lambda model: model.load_state_dict(model.state_dict())),
    ],
)
def test_copying_moving_and_restoring_inside_are_refused(what, act):
    model = student()
    with modiff.trajectory(model) as counts:
        model(*ARGS)
        with pytest.raises(TrajectoryError, match=f"cannot be {what} inside a trajectory. Leave modiff.trajectory"):
            act(model)
        model(*ARGS)
    assert counts.total == 2
    act(model)


def test_gradients_are_off_inside_and_refused_where_asked_for():
    model = student()
    with modiff.trajectory(model):
        assert not model(ARGS[0].clone().requires_grad_(), ARGS[1]).requires_grad
        x = ARGS[0].clone().requires_grad_()
        with (
            torch.enable_grad(),
            pytest.raises(TrajectoryError, match=r"'conv_in' got an input that requires a gradient"),
        ):
            model(x, ARGS[1])
    with pytest.raises(TrajectoryError, match=r"Run it under torch.no_grad\(\)"):
        student("w8a8-ptq")(x, ARGS[1])


def test_state_never_joins_a_graph():
    model = modiff.quantize(nn.Sequential(nn.Linear(4, 4)), config())
    with modiff.trajectory(model) as counts, torch.enable_grad():
        for _ in range(3):
            assert not model(torch.randn(2, 4)).requires_grad
        assert not counts.caches["0"][0].o_hat.requires_grad


def test_integer_inputs_are_refused():
    model = modiff.quantize(nn.Sequential(nn.Linear(4, 4)), config("w8a8-ptq"))
    with pytest.raises(TypeError, match="'0' got torch.int64 input; allowed are floating-point tensors. Cast it"):
        model(torch.ones(2, 4, dtype=torch.int64))


class Failing(Denoiser):
    fail = False

    def forward(self, x, t):
        output = super().forward(x, t)
        if self.fail:
            raise KeyboardInterrupt
        return output


def test_a_failed_evaluation_ends_the_use_of_its_trajectory():
    torch.manual_seed(0)
    model = modiff.quantize(Failing().requires_grad_(False), config())
    with modiff.trajectory(model):
        model(*ARGS)
        model.fail = True
        with pytest.raises(KeyboardInterrupt):
            model(*ARGS)
        model.fail = False
        with pytest.raises(TrajectoryError, match="previous evaluation of this trajectory did not finish.*Start a new"):
            model(*ARGS)
    assert run(model, noise(3))[1].total == 3


def test_an_exception_inside_closes_the_trajectory():
    model = student()

    def interrupted():
        with modiff.trajectory(model):
            model(*ARGS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    outputs, counts = run(model, noise(3))
    assert counts.total == 3
    assert torch.equal(outputs[-1], run(student(), noise(3))[0][-1])


class Twice(nn.Module):
    """One Linear at two call sites, ``sites`` times per evaluation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(4, 4).requires_grad_(False)
        self.alias = self.shared
        self.sites = 2

    def forward(self, x):
        first = self.shared(x)
        return torch.cat([first, *[self.alias(x.flip(0) * 3) for _ in range(self.sites - 1)]])


def test_a_module_used_twice_per_evaluation_keeps_a_state_for_each_call():
    spec = QuantSpec(4, "sample", symmetric=False)
    teacher = Twice().double()
    references = [ReferenceOperator(teacher.shared, None, spec, Modulation()) for _ in range(2)]
    model = modiff.quantize(teacher, QuantConfig(None, spec, Modulation()))
    assert model.shared is model.alias
    assert len(modiff.describe(model)) == 1
    with modiff.trajectory(model) as counts:
        for x in drift((3, 4), 8, dtype=torch.float64):
            expected = torch.cat([references[0].evaluate(x), references[1].evaluate(x.flip(0) * 3)])
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert len(counts.caches["shared"]) == 2
    modiff.restore(model)
    assert model.shared is model.alias


@pytest.mark.parametrize(
    ("sites", "message"), [(3, "is called more often in evaluation 1"), (1, "was called 1 times in")]
)
def test_a_change_of_the_number_of_calls_is_refused(sites, message):
    model = modiff.quantize(Twice(), config())
    with modiff.trajectory(model):
        model(torch.randn(2, 4))
        model.sites = sites
        with pytest.raises(TrajectoryError, match=f"Operator 'shared' {message}.*skip=True"):
            model(torch.randn(2, 4))


def test_another_trajectory_may_have_another_number_of_calls():
    model = modiff.quantize(Twice(), config())
    run(model, [(torch.randn(2, 4),)] * 2)
    model.sites = 3
    assert run(model, [(torch.randn(2, 4),)] * 2)[1].total == 2


def test_plain_operators_may_change_their_number_of_calls():
    model = modiff.quantize(Twice(), config("w8a4-ptq-paper"))
    with modiff.trajectory(model) as counts:
        model(torch.randn(2, 4))
        model.sites = 3
        model(torch.randn(2, 4))
    assert counts.quantized == 2


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper", "w8a32-ptq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_reported_with_first_operator_and_evaluation(preset, bad):
    model, inputs = student(preset), noise(6)
    inputs[3][1][0, 2] = bad  # the timestep's input: the first operator that sees it is not the first that runs
    with pytest.raises(
        TrajectoryError, match=r"NaN or Inf in the input of operator 'time', first in evaluation 3 of 6 \(from 0\)"
    ):
        run(model, inputs)
    assert run(model, noise(3))[1].total == 3


def test_nan_in_the_first_evaluation_and_in_the_warm_up_rounds():
    for modulation in ({}, {"warmup": "refine"}):
        inputs = noise(2)
        inputs[0][0][1, 2, 3, 4] = float("nan")
        with pytest.raises(TrajectoryError, match="operator 'conv_in', first in evaluation 0 of 2"):
            run(student(**modulation), inputs)


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y,), lambda y: {"sample": y}])
def test_nan_in_the_last_output_is_reported(wrap):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.count = 0

        def forward(self, x):
            self.count += 1
            return wrap(self.linear(x) / (3 - self.count))

    model = modiff.quantize(Last().requires_grad_(False), config())
    with pytest.raises(TrajectoryError, match="NaN or Inf in the student's output, first in evaluation 2 of 3"):
        run(model, [(torch.randn(2, 3),) for _ in range(3)])


class Syncs(TorchDispatchMode):
    """Counts the operations that read a tensor's value on the host."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_assert_async", "unique")

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.READS):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a8-modiff", "w8a4-ptq-paper", "w8a32-ptq"])
def test_no_value_is_read_on_the_host_before_the_trajectory_closes(preset):
    model, inputs = student(preset), noise(4)
    with Syncs() as syncs:
        with modiff.trajectory(model):
            for args in inputs:
                model(*args)
            assert syncs.reads == []
        # One read for each evaluation's flag, out of a single tensor that is on the host by then.
        assert len(syncs.reads) <= len(inputs)


def test_the_sync_counter_sees_item():
    with Syncs() as syncs:
        torch.ones(2).sum().item()
    assert syncs.reads


def test_state_is_freed_and_its_size_is_that_of_both_caches():
    model = student(state_dtype="float16")
    with modiff.trajectory(model) as counts:
        model(*ARGS)
        # â in float32: conv_in 3x64, time 4, conv_out 8x64 values; ô in float16: 8x64, 3x64 values, but for
        # the 8 of time (each sample one vector); 2 images.
        assert counts.state_bytes == 2 * (4 * (192 + 4 + 512) + 2 * (512 + 192) + 4 * 8)
        first = counts.caches["conv_in"][0].a_hat
        model(*ARGS)
        assert counts.caches["conv_in"][0].a_hat is first  # filled in place
        kept = weakref.ref(first)
        del first
    assert counts.state_bytes == 0
    assert counts.caches == {}
    assert kept() is None
    assert vars(scratch._LOCAL) == {}


def test_state_is_not_in_the_state_dict():
    model = student()
    keys = set(model.state_dict())
    with modiff.trajectory(model):
        model(*ARGS)
        assert set(model.state_dict()) == keys


@pytest.mark.parametrize("use", [modiff.describe, modiff.restore, lambda model: modiff.trajectory(model).__enter__()])
def test_what_needs_a_student_says_so(use):
    with pytest.raises(TrajectoryError, match="Denoiser is not a student. Call modiff.quantize"):
        use(denoiser())


def test_trajectory_errors_are_runtime_errors_too():
    assert issubclass(TrajectoryError, RuntimeError)
    assert issubclass(TrajectoryError, ModiffError)


def test_hooks_of_a_copy_belong_to_the_copy():
    model = student()
    copied = copy.deepcopy(model)
    with modiff.trajectory(copied) as counts:
        copied(*ARGS)
        with modiff.trajectory(model) as others:
            model(*ARGS)
    assert (counts.total, others.total) == (1, 1)
    assert copied.conv_in.state is copied.conv_out.state is not model.conv_in.state
