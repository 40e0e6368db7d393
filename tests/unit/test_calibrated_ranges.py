"""Operators with calibrated ranges: against the reference, buckets, and what is refused."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from small_models import denoiser, drift, modulated, noise, run
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec
from modiff.errors import CalibrationError, CheckpointError, ConfigError, TrajectoryError
from modiff.operators.quantized import QuantizedOperator
from modiff.operators.reference import ReferenceOperator
from modiff.quantizers.calibrated import CalibratedRange, bucket_of
from modiff.storage.folder import CONFIG
from modiff.storage.hashing import hash_json
from modiff.student.swap import convert, operators

LENGTH = 12
OPERATORS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 4, 4)),
    "conv1d of one sample": (lambda: nn.Conv1d(6, 4, 3), (6, 7)),
}
MODULATIONS = {
    "plain": None,
    "full": Modulation(),
    "refine": Modulation(warmup="refine"),
    "uncompensated": Modulation(error_compensation=False),
    "refresh": Modulation(refresh_every=5),
}
MODULATED = MODULATIONS["full"]
SETS = {"tensor": 1, "channel": 6, "group": 2}


def calibrated(bits=4, granularity="tensor", symmetric=True, buckets=1, **fields):
    return QuantSpec(
        bits,
        granularity,
        symmetric,
        "calibrated",
        group_size=4 if granularity == "group" else None,
        timestep_buckets=buckets,
        **fields,
    )


def some_range(spec, sets, length=LENGTH, seed=0, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    low, high = (-size * (0.2 + torch.rand(spec.timestep_buckets, sets, generator=generator)) for _ in range(2))
    return CalibratedRange.from_range(low, -high, spec, length)


def calibrated_student(spec, modulation=MODULATED, model=None, length=LENGTH, weight=None, seed=0):
    """A student of ``denoiser()`` whose operators have calibrated ranges."""
    model = denoiser() if model is None else model
    student = modiff.quantize(model, QuantConfig(weight, spec, modulation))
    for operator in operators(student).values():
        operator.use_range(some_range(spec, operator.num_sets(spec), length, seed))
    return student


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("buckets", [1, 5, LENGTH])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True), (8, False)])
@pytest.mark.parametrize(("operator", "granularity"), list(zip(OPERATORS, SETS, strict=True)))
def test_calibrated_operators_follow_the_reference(operator, granularity, bits, symmetric, buckets, modulation):
    torch.manual_seed(7)
    make, shape = OPERATORS[operator]
    module = make().double()
    spec = calibrated(bits, granularity, symmetric, buckets)
    found = some_range(spec, SETS[granularity])
    fixed = []
    for i in range(LENGTH):
        bucket = math.floor(i * buckets / LENGTH)
        scales = found.scale[bucket].tolist()
        zero_points = [0.0] * len(scales) if symmetric else found.zero_point[bucket].tolist()
        fixed.append(list(zip(scales, zero_points, strict=True)))
    weight = QuantSpec(4, "channel")
    reference = ReferenceOperator(copy.deepcopy(module), weight, spec, MODULATIONS[modulation], fixed)
    student = convert(
        nn.Sequential(module), QuantConfig(weight, spec, MODULATIONS[modulation]), True, ranges={"0": found}
    )
    with modiff.trajectory(student):
        for a in drift(shape, LENGTH, seed=11, dtype=torch.float64):
            torch.testing.assert_close(student(a), reference.evaluate(a), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("buckets", [1, 10])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False), (3, False)])
def test_invariant_1_with_calibrated_scales(bits, symmetric, buckets):
    """The output is A(â) + bias after every evaluation, whether or not codes are clamped."""
    model = calibrated_student(
        calibrated(bits, "tensor", symmetric, buckets), length=50, weight=QuantSpec(8, "channel")
    )
    with modiff.trajectory(model) as counts:
        for n, args in enumerate(noise(50), start=1):
            model(*args)
            for name, operator in modulated(model).items():
                cache = counts.caches[name][0]
                exact = copy.deepcopy(operator.module).double()
                exact.weight.copy_(operator.quantized_weight())
                wanted = exact(cache.a_hat.double())
                deviation = (cache.o_hat.double() - wanted).norm() / wanted.norm()
                # One unit for the float32 product itself, and invariant 1's bound.
                assert deviation <= torch.finfo(torch.float32).eps * (1 + math.sqrt(n)), (name, n)


def test_an_image_does_not_depend_on_its_batch():
    model = calibrated_student(calibrated(4, "channel", False, 3), length=6, model=denoiser().double())
    inputs = noise(6, batch=3, dtype=torch.float64)
    together, _ = run(model, inputs)
    alone, _ = run(model, [tuple(t[1:2] for t in args) for args in inputs])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-9, atol=1e-9)


def test_each_bucket_has_its_own_scale():
    """Residuals of .1 are codes of the scale of their own evaluation, and of no other."""
    spec = calibrated(8, buckets=2)
    found = CalibratedRange(torch.tensor([[0.5], [0.125]]), None, length=4)
    student = convert(nn.Sequential(nn.Identity(), nn.Linear(1, 1)), QuantConfig(None, spec), True, ranges={"1": found})
    inside = student.get_submodule("1").module
    with torch.no_grad():
        inside.weight.fill_(1.0)
        inside.bias.zero_()
    outputs, _ = run(student, [(torch.full((1, 1), 0.3),)] * 4)
    assert [float(o) for o in outputs] == [0.5, 0.5, 0.25, 0.25]


def test_buckets_cover_all_evaluations_evenly():
    for length in range(1, 30):
        for buckets in range(1, length + 1):
            found = [bucket_of(i, buckets, length) for i in range(length)]
            sizes = [found.count(b) for b in range(buckets)]
            assert found == sorted(found)
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 1


def check_scale_and_zero_point_change_together():
    """Trap 6: after another calibration the quantizer is that of the new range, as if the old one had not been."""
    spec = calibrated(4, "channel", symmetric=False, buckets=2)
    low, high = torch.tensor([[-1.0], [-0.1]]), torch.tensor([[0.1], [1.0]])
    first = CalibratedRange.from_range(low.expand(2, 6), high.expand(2, 6), spec, 4)
    second = CalibratedRange.from_range(-0.1 * high.expand(2, 6), -0.1 * low.expand(2, 6), spec, 4)
    outputs = []
    for found in ([second], [first, second]):
        torch.manual_seed(0)
        student = modiff.quantize(nn.Sequential(nn.Linear(6, 5)), QuantConfig(None, spec, Modulation()))
        for each in found:
            student.get_submodule("0").use_range(each)
        outputs.append(run(student, [(x,) for x in drift((3, 6), 4)])[0])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_trap_6_scale_and_zero_point_change_together():
    check_scale_and_zero_point_change_together()


@pytest.mark.parametrize("stale", ["scale", "zero_point"])
def test_trap_6_built_in_stale_zero_point(monkeypatch, stale):
    use_range = QuantizedOperator.use_range

    def forgetful(self, found):
        if self.calibrated is not None and found is not None:
            found = dataclasses.replace(found, **{stale: getattr(self.calibrated, stale)})
        use_range(self, found)

    monkeypatch.setattr(QuantizedOperator, "use_range", forgetful)
    with pytest.raises(AssertionError):
        check_scale_and_zero_point_change_together()


def test_ranges_move_with_the_student_but_keep_their_dtype():
    model = calibrated_student(calibrated(4, "channel", False, 3))
    before = {name: operator.calibrated for name, operator in operators(model).items()}
    model.to(torch.bfloat16)
    for name, operator in operators(model).items():
        assert operator.calibrated.scale.dtype == torch.float32
        assert torch.equal(operator.calibrated.scale, before[name].scale)
    assert operators(model.to("meta"))["time"].calibrated.scale.is_meta


def test_a_copy_of_a_student_has_its_ranges():
    model = calibrated_student(calibrated(4, "tensor", False, 3))
    outputs, copies = run(model, noise(LENGTH))[0], run(copy.deepcopy(model), noise(LENGTH))[0]
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))


def test_other_weights_end_a_calibration():
    model = calibrated_student(calibrated(), weight=QuantSpec(8, "channel"))
    model.load_state_dict(model.state_dict())
    assert all(operator.calibrated is not None for operator in operators(model).values())
    model.load_state_dict({key: tensor + 1 for key, tensor in model.state_dict().items()})
    with pytest.raises(CalibrationError, match="Operator 'conv_in' has range 'calibrated', but was not calibrated"):
        run(model, noise(2))


@pytest.mark.parametrize("modulation", [None, Modulation()])
def test_an_operator_without_a_range_says_so_in_the_first_evaluation(modulation):
    model = modiff.quantize(denoiser(), QuantConfig(None, calibrated(), modulation))
    operators(model)["conv_in"].use_range(some_range(calibrated(), 1))
    operators(model)["time"].use_range(some_range(calibrated(), 1))
    with pytest.raises(CalibrationError, match="Operator 'conv_out' has range 'calibrated', but was not calibrated"):
        run(model, noise(1))


@pytest.mark.parametrize("modulation", [None, Modulation()])
@pytest.mark.parametrize("buckets", [1, 3])
def test_a_longer_trajectory_is_refused(modulation, buckets):
    model = calibrated_student(calibrated(buckets=buckets), modulation, length=5)
    run(model, noise(5))
    run(model, noise(3))
    message = "longer than calibrated: the ranges of operator 'conv_in' are from trajectories of 5 evaluations"
    with pytest.raises(TrajectoryError, match=message):
        run(model, noise(6))


def test_plain_operators_need_a_trajectory_where_time_steps_differ():
    args = noise(1)[0]
    with torch.no_grad():
        calibrated_student(calibrated(), None)(*args)
        model = calibrated_student(calibrated(buckets=2), None)
        with pytest.raises(TrajectoryError, match="'conv_in' has calibrated ranges for 2 buckets .* outside a traj"):
            model(*args)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("modulation", [None, Modulation()])
def test_nan_and_inf_do_not_vanish_in_clamped_codes(value, modulation):
    model = calibrated_student(calibrated(), modulation)
    inputs = noise(3)
    inputs[1][0][0, 0, 0, 0] = value
    with pytest.raises(TrajectoryError, match="NaN or Inf in the input of operator 'conv_in', first in evaluation 1"):
        run(model, inputs)


def test_more_buckets_than_evaluations():
    message = "timestep_buckets is 3, but a trajectory has 2 evaluations only. Use at most 2."
    with pytest.raises(CalibrationError, match=message):
        CalibratedRange(torch.ones(3, 1), None, length=2)


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (torch.ones(3), None, r"scale has shape \[3\] and zero_point None"),
        (torch.ones(3, 1), torch.ones(3, 2), r"scale has shape \[3, 1\] and zero_point \[3, 2\]"),
        (torch.tensor([[0.0]]), None, "not a positive number"),
        (torch.tensor([[float("inf")]]), None, "not a positive number"),
        (torch.ones(1, 1), torch.tensor([[float("nan")]]), "zero point is NaN or Inf"),
    ],
)
def test_impossible_ranges(scale, zero_point, message):
    with pytest.raises(CalibrationError, match=message):
        CalibratedRange(scale, zero_point, length=5).check_values()


@pytest.mark.parametrize(
    "other",
    [
        calibrated(granularity="channel"),
        calibrated(symmetric=False),
        calibrated(buckets=2),
    ],
)
def test_a_range_of_another_quantizer_is_refused(other):
    model = modiff.quantize(denoiser(), QuantConfig(None, calibrated(), Modulation()))
    operator = operators(model)["conv_in"]
    with pytest.raises(CalibrationError, match="calibrated range of operator 'conv_in' is for another quantizer"):
        operator.use_range(some_range(other, operator.num_sets(other)))
    assert operator.calibrated is None


def test_a_range_for_an_operator_without_activation_codes_is_refused():
    with pytest.raises(CalibrationError, match="'conv_in' is for another quantizer than None"):
        convert(denoiser(), QuantConfig(QuantSpec(8)), True, ranges={"conv_in": some_range(calibrated(), 1)})


def test_weights_have_no_calibrated_range():
    with pytest.raises(ConfigError, match="weight range is 'calibrated'; a weight's range is its own. Use 'dynamic'"):
        QuantConfig(weight=calibrated())


def test_clip_multiplies_a_calibrated_range_once():
    low, high = torch.tensor([[-2.0]]), torch.tensor([[4.0]])
    whole, clipped = (CalibratedRange.from_range(low, high, calibrated(8, clip=clip), 5) for clip in (1.0, 0.5))
    assert torch.equal(clipped.scale, whole.scale / 2)


def test_the_description_says_calibrated():
    model = modiff.quantize(denoiser(), QuantConfig(None, calibrated(buckets=4), Modulation()))
    assert "4 bit, tensor, symmetric, calibrated in 4 buckets" in str(modiff.describe(model))


def full_or_meta(where):
    if where == "full":
        return denoiser(seed=3)
    with torch.device("meta"):
        return denoiser()


@pytest.mark.parametrize("where", ["full", "meta"])
@pytest.mark.parametrize("weight", [None, QuantSpec(4, "channel")])
@pytest.mark.parametrize(("granularity", "symmetric"), [("tensor", True), ("group", False)])
def test_a_checkpoint_keeps_calibrated_ranges_bit_for_bit(tmp_path, granularity, symmetric, weight, where):
    model = calibrated_student(calibrated(4, granularity, symmetric, buckets=5), weight=weight)
    loaded = modiff.load(modiff.save(model, tmp_path / "ckpt"), full_or_meta(where))
    for name, operator in operators(model).items():
        found = operators(loaded)[name].calibrated
        assert found.length == LENGTH
        assert torch.equal(found.scale, operator.calibrated.scale)
        assert symmetric or torch.equal(found.zero_point, operator.calibrated.zero_point)
    outputs, again = run(model, noise(LENGTH))[0], run(loaded, noise(LENGTH))[0]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_a_student_that_was_not_calibrated_is_not_saved(tmp_path):
    model = modiff.quantize(denoiser(), QuantConfig(None, calibrated(), Modulation()))
    with pytest.raises(CalibrationError, match="Operator 'conv_in' has range 'calibrated', but was not calibrated"):
        modiff.save(model, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_checkpoint_of_before_calibrated_ranges_is_read(tmp_path):
    model = modiff.quantize(denoiser(), QuantConfig.preset("w4a4-modiff-paper"))
    path = modiff.save(model, tmp_path / "ckpt")
    manifest = json.loads((path / CONFIG).read_text())
    for gone in ("sha256", "calibrated_evaluations"):
        del manifest[gone]
    for side in ("weight", "activation"):
        del manifest["quant_config"][side]["timestep_buckets"]
    manifest["format_version"] = 1
    manifest["sha256"] = hash_json(manifest)
    (path / CONFIG).write_text(json.dumps(manifest))
    outputs, again = run(model, noise(4))[0], run(modiff.load(path, denoiser()), noise(4))[0]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_a_checkpoint_that_lost_a_range_is_refused(tmp_path):
    path = modiff.save(calibrated_student(calibrated()), tmp_path / "ckpt")
    manifest = json.loads((path / CONFIG).read_text())
    del manifest["sha256"], manifest["calibrated_evaluations"]["time"]
    manifest["sha256"] = hash_json(manifest)
    (path / CONFIG).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="the input of operator 'time' has a calibrated range in this model only"):
        modiff.load(path, denoiser())
