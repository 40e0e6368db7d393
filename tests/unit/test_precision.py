"""dtypes, autocast, memory layouts and borrowed memory: nothing of it reaches the differences or the state."""

import pytest
import torch
from small_models import config, denoiser, drift, noise, run, student
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_answer_in_their_dtype_and_keep_float32_differences(preset, dtype):
    inputs = noise(6, dtype=dtype)
    model = modiff.quantize(denoiser().to(dtype), config(preset))
    with modiff.trajectory(model) as counts:
        outputs = [model(*args) for args in inputs]
        assert {t.dtype for c in counts.caches.values() for t in (c[0].a_hat, c[0].o_hat)} <= {torch.float32}
    assert {o.dtype for o in outputs} == {dtype}
    expected = [denoiser()(*(a.float() for a in args)) for args in inputs]
    for found, wanted in zip(outputs, expected, strict=True):
        assert (found.float() - wanted).norm() < (0.15 if preset.endswith("modiff") else 0.3) * wanted.norm()


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper"])
def test_autocast_leaves_differences_and_products_in_float32(preset):
    """The float32 norm between them sees the same numbers, rounded to bfloat16 once per operator."""
    model = student(preset)
    with modiff.trajectory(model) as counts, torch.autocast("cpu", torch.bfloat16):
        output = [model(*args) for args in noise(3)][-1]
        assert {t.dtype for c in counts.caches.values() for t in (c[0].a_hat, c[0].o_hat)} <= {torch.float32}
    assert output.dtype == torch.bfloat16
    single = modiff.quantize(nn.Sequential(nn.Linear(6, 5)).requires_grad_(False), config(preset))
    inputs = [(x,) for x in drift((3, 6), 5)]
    expected, _ = run(single, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = run(single, inputs)
    assert all(torch.equal(f, e.bfloat16()) for f, e in zip(found, expected, strict=True))


def test_autocast_leaves_float64_alone_as_pytorch_does():
    teacher = nn.Sequential(nn.Linear(6, 5)).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(x).dtype
        outputs, _ = run(modiff.quantize(teacher, config()), [(x,)])
    assert outputs[0].dtype == wanted == torch.float64


@pytest.mark.parametrize("modulation", [{}, {"state_dtype": "float16"}])
def test_overwriting_an_output_or_an_input_does_not_reach_the_state(modulation):
    inputs = drift((2, 4), 5)

    def outputs(spoil):
        torch.manual_seed(0)
        base = config(**modulation)
        model = modiff.quantize(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), base)
        kept = []
        with modiff.trajectory(model):
            for x in inputs:
                x = x.clone()
                y = model(x)
                kept.append(y.clone())
                if spoil:
                    y.fill_(1e9)
                    x.fill_(-1e9)
        return kept

    assert all(torch.equal(a, b) for a, b in zip(outputs(True), outputs(False), strict=True))


def test_plain_operators_leave_their_input_alone():
    model = modiff.quantize(nn.Sequential(nn.Linear(4, 4)).requires_grad_(False), config("w8a2-ptq-paper"))
    x = torch.randn(2, 4)
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("preset", ["w8a4-modiff-paper", "w8a4-ptq-paper"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
        lambda x: torch.complex(x, x).conj().imag,
    ],
    ids=["channels_last", "transposed", "expanded", "strided", "negative"],
)
def test_memory_layouts_change_nothing(preset, layout):
    torch.manual_seed(0)
    model = modiff.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).requires_grad_(False), config(preset))
    inputs = [layout(x) for x in drift((2, 3, 6, 6), 5)]
    expected, _ = run(model, [(x.contiguous().resolve_neg(),) for x in inputs])
    found, _ = run(model, [(x,) for x in inputs])
    mixed, _ = run(model, [(x if i % 2 else x.contiguous(),) for i, x in enumerate(inputs)])
    for outputs in (found, mixed):
        for a, b in zip(outputs, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "sample", "channel", "sample_channel", "group"])
def test_empty_batches_pass_through(granularity):
    spec = QuantSpec(4, granularity, group_size=2 if granularity == "group" else None)
    for modulation in (Modulation(), Modulation(warmup="refine"), None):
        model = modiff.quantize(
            nn.Sequential(nn.Conv2d(3, 4, 3)).requires_grad_(False), QuantConfig(spec_w(), spec, modulation)
        )
        outputs, counts = run(model, [(torch.empty(0, 3, 5, 5),)] * 3)
        assert outputs[-1].shape == (0, 4, 3, 3)
        assert counts.total == 3


def spec_w():
    return QuantSpec(8, "channel")


@pytest.mark.parametrize("preset", ["w4a4-modiff-paper", "w4a4-ptq-paper"])
def test_casting_a_student_does_not_round_its_quantized_weights(preset):
    model = student(preset)
    before = {name: m._quantized_weight.clone() for name, m in model.named_modules() if hasattr(m, "_quantized_weight")}
    model.to(torch.bfloat16)
    assert model.conv_in.weight.dtype == torch.bfloat16
    assert len(before) == 3
    for name, weight in before.items():
        assert torch.equal(model.get_submodule(name)._quantized_weight, weight)
    outputs, _ = run(model, noise(2, dtype=torch.bfloat16))
    assert outputs[-1].dtype == torch.bfloat16
