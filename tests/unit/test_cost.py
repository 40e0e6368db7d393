"""Cost against numbers worked out by hand."""

import dataclasses

import pytest
import torch
from small_models import Attention, config, denoiser, noise, student, tiny_unet
from torch import nn

import modiff
from modiff import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import ConfigError, TrajectoryError
from modiff.student.cost import warm_evaluations, weight_bytes

ARGS = noise(1, batch=2)[0]
# Denoiser on 3x8x8 images: outputs x inputs of one output.
MACS = {"conv_in": 8 * 64 * 3 * 9, "time": 8 * 4, "conv_out": 3 * 64 * 8 * 9}
WEIGHTS = {"conv_in": 8 * 3 * 9, "time": 8 * 4, "conv_out": 3 * 8 * 9}
OTHERS = 8 + 8 + 16  # two biases and the norm
STATE = {"conv_in": 3 * 64 + 8 * 64, "time": 4 + 8, "conv_out": 8 * 64 + 3 * 64}


def test_a_teacher_by_hand():
    cost = modiff.cost(denoiser(), *ARGS)
    assert {row.name: row.macs for row in cost.operators} == MACS
    assert {(row.weight_bits, row.activation_bits) for row in cost.operators} == {(32, 32)}
    assert cost.other_macs == 0
    assert cost.gbops_per_evaluation == pytest.approx(sum(MACS.values()) * 32 * 32 / 1e9)
    assert cost.weight_mib == 4 * (sum(WEIGHTS.values()) + OTHERS) / 2**20
    assert cost.state_mib_per_image == 0


def test_a_teacher_in_half_precision_by_hand():
    cost = modiff.cost(denoiser().half(), *[a.half() for a in ARGS])
    assert cost.gbops_per_evaluation == pytest.approx(sum(MACS.values()) * 16 * 16 / 1e9)
    assert cost.weight_mib == 2 * (sum(WEIGHTS.values()) + OTHERS) / 2**20


@pytest.mark.parametrize(
    ("modulation", "full", "low"),
    [
        ({}, 1, 9),
        ({"warmup": "refine"}, 0, 12),
        ({"warmup": "refine", "warmup_rounds": 1}, 0, 10),
        ({"refresh_every": 4}, 3, 7),
        ({"refresh_every": 5}, 2, 8),
        ({"refresh_every": 4, "warmup": "refine"}, 2, 10),
        ({"error_compensation": False}, 1, 9),
    ],
)
def test_a_student_by_hand_with_warm_up_and_refreshes(modulation, full, low):
    """Ten evaluations: ``full`` ones at 32 bits, ``low`` products at 4 bits; weights at 8 bits in all."""
    cost = modiff.cost(student("w8a4-modiff-paper", **modulation), *ARGS, evaluations=10)
    for row in cost.operators:
        assert row.macs == MACS[row.name]
        assert row.bops == pytest.approx(MACS[row.name] * 8 * (full * 32 + low * 4) / 10)
        assert row.state_bytes == 4 * STATE[row.name]
    assert cost.gbops_per_evaluation == pytest.approx(sum(MACS.values()) * 8 * (full * 32 + low * 4) / 10 / 1e9)


@pytest.mark.parametrize(
    ("modulation", "full", "low"),
    [({}, 2, 9), ({"warmup": "refine"}, 0, 15), ({"refresh_every": 3}, 4, 7)],
)
def test_each_context_warms_up_and_holds_a_state(modulation, full, low):
    """Eleven calls in two contexts, of six and five: guidance in two calls per step that ends in the last one."""
    model = student("w8a4-modiff-paper", **modulation)
    with modiff.trajectory(model) as counts:
        for i, args in enumerate(noise(11, batch=2)):
            with counts.context(("cond", "uncond")[i % 2]):
                model(*args)
        allocated = counts.state_bytes
    given = modiff.cost(student("w8a4-modiff-paper", **modulation), *ARGS, evaluations=11, contexts=2)
    found = modiff.cost(model, *ARGS, evaluations=11)  # those of its last trajectory
    assert found == given
    assert full == counts.total - counts.quantized
    for row in given.operators:
        assert row.bops == pytest.approx(MACS[row.name] * 8 * (full * 32 + low * 4) / 11)
        assert row.state_bytes == 2 * 4 * STATE[row.name]
    assert given.state_mib_per_image * 2**20 * 2 == allocated
    assert given.contexts == 2
    assert modiff.cost(model, *ARGS, evaluations=11, contexts=1).contexts == 1
    assert modiff.cost(model, *ARGS, evaluations=1).contexts == 1


@pytest.mark.parametrize("contexts", [0, 6, True, 1.5])
def test_impossible_contexts_are_refused(contexts):
    with pytest.raises(ConfigError, match=r"contexts is .*; allowed are whole numbers from 1 to evaluations \(5\)"):
        modiff.cost(student("w8a4-modiff-paper"), *ARGS, evaluations=5, contexts=contexts)


def test_refreshes_and_warm_up_that_are_counted_are_those_that_happen():
    for modulation in (Modulation(), Modulation(refresh_every=4), Modulation(warmup="refine", refresh_every=3)):
        for evaluations in (1, 3, 4, 5, 10):
            model = modiff.quantize(denoiser(), QuantConfig(None, QuantSpec(4, "sample"), modulation))
            with modiff.trajectory(model) as counts:
                for args in noise(evaluations):
                    model(*args)
            full, _ = warm_evaluations(modulation, evaluations)
            assert full == counts.total - counts.quantized, (modulation, evaluations)


def test_plain_quantization_has_no_warm_up_and_no_state():
    cost = modiff.cost(student("w8a4-ptq-paper"), *ARGS)
    assert cost.gbops_per_evaluation == pytest.approx(sum(MACS.values()) * 8 * 4 / 1e9)
    assert cost.state_mib_per_image == 0


def test_full_precision_activations_count_as_such():
    cost = modiff.cost(student("w8a32-modiff"), *ARGS)
    assert cost.gbops_per_evaluation == pytest.approx(sum(MACS.values()) * 8 * 32 / 1e9)
    assert cost.state_mib_per_image == 0


def test_skipped_operators_count_at_full_precision():
    base = config()
    model = modiff.quantize(
        denoiser(), QuantConfig(base.weight, base.activation, base.modulation, [Rule("conv_out", skip=True)])
    )
    rows = {row.name: row for row in modiff.cost(model, *ARGS).operators}
    assert rows["conv_out"].bops == MACS["conv_out"] * 32 * 32
    assert rows["conv_out"].state_bytes == 0


@pytest.mark.parametrize("keep_teacher", [True, False])
def test_weight_bytes_by_hand(keep_teacher):
    model = modiff.quantize(denoiser(), config("w4a4-modiff-paper"), keep_teacher=keep_teacher)
    # 4 bits a weight and a float32 scale per output channel: 8, 8 and 3.
    assert weight_bytes(model) == sum(WEIGHTS.values()) / 2 + 4 * (8 + 8 + 3) + 4 * OTHERS
    asymmetric = QuantConfig(QuantSpec(2, "group", symmetric=False, group_size=3))
    model = modiff.quantize(denoiser(), asymmetric, keep_teacher=keep_teacher)
    scales = 8 * 1 + 8 * 2 + 3 * 3  # groups of 3 inputs: 3, 4 and 8 inputs
    assert weight_bytes(model) == sum(WEIGHTS.values()) / 4 + 5 * scales + 4 * OTHERS


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 64
    modiff.quantize(model, QuantConfig(QuantSpec(8, "tensor")))
    assert weight_bytes(model) == 2 * (16 + 4)


INT16 = {"reconstruction_dtype": "int16"}


@pytest.mark.parametrize(
    "modulation", [{}, {"state_dtype": "float16"}, {"warmup": "refine"}, INT16, {"state_dtype": "float16", **INT16}]
)
def test_state_is_what_is_allocated(modulation):
    model = student(**modulation)
    predicted = modiff.cost(model, *ARGS).state_mib_per_image
    with modiff.trajectory(model) as counts:
        for args in noise(3, batch=5):
            model(*args)
        storages = [t.untyped_storage().nbytes() for c in counts.caches.values() for t in (c[0].a_hat, c[0].o_hat)]
    assert predicted == sum(storages) / 5 / 2**20
    a_hat, o_hat, vector = 192 + 512, 512 + 192, 4 + 8  # a vector of time stays in float32
    sizes = (2 if "reconstruction_dtype" in modulation else 4, 2 if "state_dtype" in modulation else 4)
    assert predicted == (sizes[0] * a_hat + sizes[1] * o_hat + 4 * vector) / 2**20


def test_rows_and_the_rest_sum_to_the_totals_and_to_the_file(tmp_path):
    """The file: 8 bytes, a header of which they say the length, and the tensors."""
    for name, preset in (("whole", "w8a4-modiff-paper"), ("packed", "w3a6-modiff-paper")):
        model = modiff.quantize(tiny_unet(), config(preset))
        packed = model.conv_in.packed
        model.conv_in.use(dataclasses.replace(packed, shift=torch.zeros(8)))  # as a calibration leaves it
        cost = modiff.cost(model, torch.randn(2, 1, 8, 8), torch.tensor(10))
        stored = sum(row.weight_bytes for row in cost.operators) + cost.other_weight_bytes
        assert stored == pytest.approx(cost.weight_mib * 2**20)
        assert sum(row.bops for row in cost.operators) + cost.other_bops == pytest.approx(
            1e9 * cost.gbops_per_evaluation
        )
        assert sum(row.state_bytes for row in cost.operators) == pytest.approx(cost.state_mib_per_image * 2**20)
        file = (modiff.save(model, tmp_path / name) / "model.safetensors").read_bytes()
        assert not list(model.buffers())  # which the file would hold and the cost does not count
        assert len(file) == 8 + int.from_bytes(file[:8], "little") + stored


def test_weights_of_an_operator_by_hand():
    rows = {row.name: row.weight_bytes for row in modiff.cost(student("w4a4-modiff-paper"), *ARGS).operators}
    codes = {name: count / 2 for name, count in WEIGHTS.items()}
    scales_and_bias = {"conv_in": 4 * 8 + 4 * 8, "time": 4 * 8 + 4 * 8, "conv_out": 4 * 3}
    assert rows == {name: codes[name] + scales_and_bias[name] for name in WEIGHTS}
    assert modiff.cost(student("w4a4-modiff-paper"), *ARGS).other_weight_bytes == 4 * 16  # the norm


def test_state_agrees_with_the_buffers_of_a_trajectory():
    model = modiff.quantize(tiny_unet(), config("w8a6-modiff-paper"))
    cost = modiff.cost(model, torch.randn(1, 1, 8, 8), torch.tensor(10))
    with modiff.trajectory(model) as run:
        for t in (10, 9):
            model(torch.randn(3, 1, 8, 8), torch.tensor(t))
        caches = [cache for sites in run.caches.values() for cache in sites]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for c in caches for t in (c.a_hat, c.o_hat)}
        measured = sum(storage.nbytes() for storage in storages.values())
        # The time embedding has one row, whatever the batch.
        shared = sum(
            storages[t.untyped_storage().data_ptr()].nbytes()
            for c in caches
            for t in (c.a_hat, c.o_hat)
            if t.shape[0] == 1
        )
    assert measured - shared == pytest.approx(3 * (cost.state_mib_per_image * 2**20 - shared))


def test_attention_counts_at_the_precision_it_runs_in():
    """Products of two activations: 32 bits, 16 under autocast (as the whole full-precision teacher then), 64."""
    x, t = torch.randn(1, 1, 8, 8), torch.tensor(10)
    macs = modiff.cost(tiny_unet(), x, t).other_macs
    for bits in (32, 16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
            teacher = modiff.cost(tiny_unet(), x, t)
            student = modiff.cost(modiff.quantize(tiny_unet(), config("w8a4-ptq-paper")), x, t)
        for found in (teacher, student):
            assert (found.other_macs, found.other_bops) == (macs, macs * bits * bits)
        convolutions = [row for row in teacher.operators if row.name.startswith("conv")]
        assert {(row.weight_bits, row.activation_bits) for row in convolutions} == {(bits, bits)}
        assert {(row.weight_bits, row.activation_bits) for row in student.operators} == {(8, 4)}
    double = modiff.cost(tiny_unet().double(), x.double(), t)
    assert double.other_bops == macs * 64 * 64


def attention_macs(batch=1, heads=2, tokens=16, width=8):
    return batch * heads * 2 * tokens * tokens * width


@pytest.mark.parametrize("preset", [None, "w8a4-modiff-paper", "w8a4-ptq-paper"])
def test_attention_products_of_a_unet_are_counted(preset):
    """Three attention blocks of 2 heads x 8 channels on 4x4 tokens: down, middle, up (twice)."""
    unet = tiny_unet()
    blocks = sum(type(m).__name__ == "Attention" for m in unet.modules())
    assert blocks == 4
    if preset:
        modiff.quantize(unet, config(preset))
    x = torch.randn(3, 1, 8, 8)
    cost = modiff.cost(unet, x, torch.tensor(10))
    assert cost.other_macs == blocks * attention_macs()
    operators = sum(row.bops for row in cost.operators)
    assert cost.gbops_per_evaluation == pytest.approx((operators + cost.other_macs * 32 * 32) / 1e9)
    linear = {name: m for name, m in tiny_unet().named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {row.name for row in cost.operators} == set(linear)
    # A time embedding by hand, and a convolution on the full image.
    rows = {row.name: row.macs for row in cost.operators}
    assert rows["conv_in"] == 64 * 8 * 9
    assert rows["time_embedding.linear_1"] == 8 * 32


def test_the_count_of_attention_agrees_with_its_unfused_form(monkeypatch):
    def unfused(q, k, v, *_, **__):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v

    unet, x = tiny_unet(), torch.randn(1, 1, 8, 8)
    fused = modiff.cost(unet, x, torch.tensor(10)).other_macs
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", unfused)
    assert modiff.cost(unet, x, torch.tensor(10)).other_macs == fused > 0


def test_modules_without_an_adapter_are_counted_as_others():
    """Two multi-head attentions on 5 tokens of width 8: 4 projections and 2 products each; the fast path hides none."""
    model = Attention().eval().requires_grad_(False)
    fast = torch.backends.mha.get_fastpath_enabled()
    cost = modiff.cost(model, torch.randn(2, 5, 8))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    rows = {row.name: row.macs for row in cost.operators}
    assert rows["layer.linear1"] == 5 * 8 * 16
    assert cost.other_macs + rows.get("attention.out_proj", 0) + rows.get("layer.self_attn.out_proj", 0) == 2 * (
        4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    )


def test_an_operator_called_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x))

    cost = modiff.cost(modiff.quantize(Twice(), config()), torch.randn(3, 4))
    assert cost.operators[0].macs == 2 * 16
    assert cost.operators[0].state_bytes == 2 * 4 * 8


def test_cost_leaves_no_trace():
    model = student()
    modiff.cost(model, *ARGS)
    assert not model.conv_in._forward_hooks
    assert not model.conv_in._forward_pre_hooks
    assert model.conv_in.state.trajectory is None


def test_cost_prints_its_three_numbers():
    text = str(modiff.cost(student(), *ARGS, evaluations=20))
    assert "GBOPs per image and evaluation (mean of 20)" in text
    assert "MiB of weights" in text
    assert "MiB of state per image" in text


@pytest.mark.parametrize("evaluations", [0, -1, 2.5, True])
def test_evaluations_out_of_range(evaluations):
    with pytest.raises(ConfigError, match=rf"evaluations is {evaluations}; allowed are whole numbers, 1 or more\."):
        modiff.cost(student(), *ARGS, evaluations=evaluations)


@pytest.mark.parametrize("args", [(), (3, "x"), (torch.tensor(1.0),), (torch.empty(0, 3, 8, 8),)])
def test_cost_without_a_batch(args):
    with pytest.raises(ConfigError, match=r"got no tensor with a batch in dim 0.*cost\(student, x, t\)"):
        modiff.cost(student(), *args)


def test_cost_inside_a_trajectory_is_refused():
    model = student()
    with modiff.trajectory(model), pytest.raises(TrajectoryError, match="already open"):
        modiff.cost(model, *ARGS)


def test_peak_state_adds_the_codes_of_the_widest_input():
    """On a GPU one operator's codes, a byte each, are there beside all states."""
    found = modiff.cost(student("w8a8-modiff"), *noise(1)[0])
    widest = 8 * 8 * 8  # conv_out reads 8 channels of 8x8 pixels
    assert found.peak_state_mib_per_image == pytest.approx(found.state_mib_per_image + widest / 2**20)
    plain = modiff.cost(denoiser(), *noise(1)[0])
    assert plain.peak_state_mib_per_image == plain.state_mib_per_image == 0
