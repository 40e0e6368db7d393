"""What others do to a student behind its back takes effect, or is refused by name; nothing is silently ignored."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modiff
from modiff import QuantConfig, QuantSpec
from modiff.errors import ConfigError, TrajectoryError


class ReadsWeight(nn.Module):
    """Calls one operator, and multiplies by the weight of the other itself, as attention pools do."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.a(x), self.b.weight, self.b.bias)


class Conv(nn.Module):
    def __init__(self, conv: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(4, 4, 3, padding=1) if conv is None else conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
BACKENDS = ["simulate", "auto"]


def preset(name: str, backend: str = "auto") -> QuantConfig:
    config = QuantConfig.preset(name)
    return QuantConfig(config.weight, config.activation, config.modulation, config.rules, backend=backend)


def run(student: nn.Module, x: torch.Tensor, evaluations: int = 1) -> torch.Tensor:
    with modiff.trajectory(student):
        for i in range(evaluations):
            out = student(x * (1 - 0.1 * i))
    return out


@pytest.mark.parametrize("name", ["w4a32-modiff-paper", "w4a8-ptq-paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_read_past_its_operator_is_the_quantized_one_everywhere(tmp_path, name, dtype) -> None:
    one = modiff.quantize(ReadsWeight(0).to(dtype), QuantConfig.preset(name))
    modiff.save(one, tmp_path / "s")
    two = modiff.load(tmp_path / "s", ReadsWeight(1).to(dtype))
    three = modiff.quantize(ReadsWeight(0).to(dtype), QuantConfig.preset(name), keep_teacher=False)
    four = modiff.load(tmp_path / "s", ReadsWeight(1).to(dtype), keep_teacher=False)
    outputs = [run(student, X.to(dtype)) for student in (one, two, three, four)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    expected = ReadsWeight(0)
    values = one.b.quantized_weight()
    assert not torch.equal(values, expected.b.weight)
    assert torch.equal(one.b.weight, values.to(dtype))


def test_operators_that_are_never_called_are_reported(caplog) -> None:
    student = modiff.quantize(ReadsWeight(), QuantConfig.preset("w4a8-ptq-paper"))
    assert not any(row.uncalled for row in modiff.describe(student))
    with caplog.at_level(logging.WARNING, "modiff"):
        run(student, X)
        run(student, X)
    assert [r.message for r in caplog.records] == [
        "Never called in this trajectory, so that their inputs were not quantized: 'b'. Their module is not used, or "
        "other code multiplies by their weight itself."
    ]
    assert {row.name: row.uncalled for row in modiff.describe(student)} == {"a": False, "b": True}
    assert "never called" in str(modiff.describe(student))
    costs = {row.name: row for row in modiff.cost(student, X).operators}
    assert costs["b"].uncalled
    assert not costs["a"].uncalled
    assert "1 of 2 operators was never called" in str(modiff.cost(student, X))


def ema(student: nn.Module) -> None:
    from diffusers.training_utils import EMAModel

    average = EMAModel([p.detach().clone() + 0.1 for p in student.parameters()])
    average.copy_to(list(student.parameters()))


def data(student: nn.Module) -> None:
    student.a.module.weight.data += 0.1


def data_of_the_operator(student: nn.Module) -> None:
    student.a.weight.data += 0.1


def in_place(student: nn.Module) -> None:
    with torch.no_grad():
        student.a.module.weight.mul_(2)


def exchanged_rows(student: nn.Module) -> None:
    student.a.module.weight.data = student.a.module.weight.data.flip(0)


@pytest.mark.parametrize("change", [ema, data, data_of_the_operator, in_place, exchanged_rows])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["w8a7-modiff-paper", "w8a7-ptq-paper"])
def test_a_weight_that_was_written_to_is_refused_when_the_next_trajectory_opens(change, backend, name) -> None:
    student = modiff.quantize(Conv(), preset(name, backend))
    run(student, IMAGE, 2)
    change(student)
    with pytest.raises(TrajectoryError, match=r"weight of operator 'a' was written to.*restore\(student\)"):
        run(student, IMAGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_a_student_does_to_its_own_weights_is_no_change(tmp_path, dtype) -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a7-modiff-paper"))
    run(student, IMAGE)
    run(copy.deepcopy(student), IMAGE)
    run(student.to(memory_format=torch.channels_last), IMAGE)
    student.load_state_dict({k: v + 0.1 for k, v in student.state_dict().items()})
    run(student, IMAGE)
    run(student.to(dtype), IMAGE.to(dtype))
    run(pickle.loads(pickle.dumps(student)), IMAGE.to(dtype))
    _ = student.a.weight
    run(student, IMAGE.to(dtype))


def test_changed_weights_restore_and_quantize_again() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    data(student)
    teacher = modiff.restore(student)
    out = run(modiff.quantize(teacher, QuantConfig.preset("w8a8-ptq")), IMAGE)
    expected = Conv()
    expected.a.weight.data += 0.1
    assert (out - expected(IMAGE)).norm() / out.norm() < 0.02


def test_assigning_weight_and_bias() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    with pytest.raises(ConfigError, match="weight of operator 'a' is quantized; another one assigned to it would be"):
        student.a.weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
    before = run(student, IMAGE)
    student.a.bias = nn.Parameter(student.a.module.bias.detach() + 1)
    assert torch.allclose(run(student, IMAGE), before + 1, atol=1e-6)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qk(x) if hasattr(self, "qk") else self.q(x) + self.k(x)


def test_operators_that_are_added_or_replaced_are_refused() -> None:
    student = modiff.quantize(Blocks(), QuantConfig.preset("w8a8-ptq"))
    student.qk = nn.Linear(8, 8)
    with pytest.raises(TrajectoryError, match=r"'qk' \(Linear\) was added to the student after it was quantized"):
        run(student, X)
    del student.qk
    run(student, X)
    student.q = nn.Linear(8, 8)
    with pytest.raises(TrajectoryError, match="Operator 'q' is no longer in its place"):
        run(student, X)


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )


def test_methods_of_a_denoiser_that_act_past_the_student_are_refused(tmp_path) -> None:
    student = modiff.quantize(unet(), QuantConfig.preset("w8a8-ptq"))
    for call, message in (
        (
            student.fuse_qkv_projections,
            r"fuse_qkv_projections on a quantized UNet2DConditionModel .*restore\(student\)",
        ),
        (student.unfuse_qkv_projections, "would replace quantized operators by full-precision ones"),
        (lambda: student.save_pretrained(tmp_path), r"Save it by modiff\.save\(student, folder\)"),
        (student.fuse_lora, "would change the original weights, not the quantized ones"),
        (student.unfuse_lora, "would change the original weights"),
        (lambda: student.add_adapter(None), "would change the original weights"),
        (lambda: student.enable_group_offload(torch.device("cpu")), "moves the weight of each operator"),
        (student.enable_layerwise_casting, "would cast the weight of each operator"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ConfigError, match="fuse_qkv_projections on a quantized"):
        copy.deepcopy(student).fuse_qkv_projections()
    assert not list(tmp_path.iterdir())
    modiff.restore(student).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir())


class Circular(nn.Conv2d):
    """Tiles, as patches for seamless textures do."""

    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def patched() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    conv._conv_forward = Circular._conv_forward.__get__(conv)
    return conv


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [patched, lambda: Circular(4, 4, 3, padding=1)])
def test_a_convolution_with_code_of_its_own_is_left_as_it_is(backend, make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Conv2d(4, 4, 1))
    teacher = copy.deepcopy(model)
    student = modiff.quantize(model, preset("w8a8-ptq", backend))
    rows = {row.name: row.skipped for row in modiff.describe(student)}
    assert "overrides the _conv_forward of Conv2d" in rows["0"]
    out, expected = run(student, IMAGE), teacher(IMAGE)
    assert (out - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["w8a7-ptq-paper", "w8a7-modiff-paper"])
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("attribute", "value"),
    [("padding_mode", "circular"), ("stride", (2, 2)), ("dilation", (2, 2)), ("padding", (0, 0))],
)
def test_geometry_that_is_written_takes_effect(backend, name, inner, attribute, value) -> None:
    student = modiff.quantize(Conv(), preset(name, backend))
    run(student, IMAGE, 2)
    changed = Conv()
    for operator in (student.a.module if inner else student.a, changed.a):
        setattr(operator, attribute, value)
        if attribute == "padding":
            operator._reversed_padding_repeated_twice = [0, 0, 0, 0]
    assert getattr(student.a, attribute) == value
    out = run(student, IMAGE)
    expected = changed(IMAGE)
    assert out.shape == expected.shape
    assert (out - expected).norm() / expected.norm() < 0.03


def test_code_that_is_put_on_a_quantized_convolution_is_refused() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    student.a._conv_forward = Circular._conv_forward.__get__(student.a.module)
    with pytest.raises(TrajectoryError, match="'a' was changed after it was quantized: Conv2d overrides the _conv_fo"):
        run(student, IMAGE)


def test_hooks_on_an_original_are_refused() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    student.a.module.register_forward_hook(lambda *_: None)
    with pytest.raises(TrajectoryError, match="'a' was changed after it was quantized: its original has forward hooks"):
        run(student, IMAGE)


@pytest.mark.parametrize("name", ["w8a8-modiff", "w8a8-ptq"])
def test_operators_take_their_input_by_name(name) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(input=x)

    model = ByName()
    expected = model(X)
    student = modiff.quantize(model, QuantConfig(QuantSpec(8, "channel"), *_sides(name)))
    assert torch.allclose(run(student, X), expected, atol=0.05)


def _sides(name: str) -> tuple:
    config = QuantConfig.preset(name)
    return config.activation, config.modulation


@pytest.mark.parametrize(("attribute", "value"), [("groups", 2), ("out_channels", 2), ("kernel_size", (1, 1))])
def test_geometry_that_the_weight_does_not_fit_is_refused(attribute, value) -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    setattr(student.a, attribute, value)
    with pytest.raises(TrajectoryError, match="'a' was changed after it was quantized: its channels, kernel or groups"):
        run(student, IMAGE)


def test_a_plain_student_outside_of_a_trajectory_sees_counted_writes_too() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    with torch.no_grad():
        student(IMAGE)
        in_place(student)
        with pytest.raises(TrajectoryError, match=r"weight of operator 'a' was written to.*restore\(student\)"):
            student(IMAGE)


@pytest.mark.parametrize("wrap", ["prune", "parametrize"])
def test_a_parametrized_original_is_refused(wrap) -> None:
    from torch.nn.utils import parametrize, prune

    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-modiff"))
    if wrap == "prune":
        prune.l1_unstructured(student.a.module, "weight", 0.5)
    else:
        parametrize.register_parametrization(student.a.module, "weight", nn.Softplus())
    with pytest.raises(TrajectoryError, match=r"operator 'a' was .*|Operator 'a' was changed"):
        run(student, IMAGE)


def test_to_empty_is_refused() -> None:
    student = modiff.quantize(Conv(), QuantConfig.preset("w8a8-ptq"))
    with pytest.raises(ConfigError, match="to_empty on a quantized Conv would leave its codes and scales without cont"):
        student.to_empty(device="cpu")
    run(student, IMAGE)


def test_tensors_loaded_into_a_part_of_a_student_are_quantized_again() -> None:
    student = modiff.quantize(nn.Sequential(Conv()), QuantConfig.preset("w8a8-ptq"))
    student[0].load_state_dict({key: 2 * value for key, value in student[0].state_dict().items()})
    expected = 2 * Conv()(IMAGE)
    assert (run(student, IMAGE) - expected).norm() / expected.norm() < 0.02
