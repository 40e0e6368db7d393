"""A checkpoint gives the same outputs bit for bit; students save, load, restore and copy."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from checkpoints import Denoiser, meta, refuses, sample, saved
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_models import tiny_unet
from torch import nn

import modiff
from modiff.config.quant import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import CheckpointError, ConfigError, TrajectoryError
from modiff.storage.folder import CONFIG, TENSORS
from modiff.student.tensors import slots

WEIGHTS = [QuantSpec(bits, "channel") for bits in range(2, 9)]
WEIGHTS += [QuantSpec(bits, "group", symmetric=False, group_size=3) for bits in range(2, 9)]
WEIGHTS += [QuantSpec(3, "tensor"), QuantSpec(5, "tensor", symmetric=False), QuantSpec(6, "channel", symmetric=False)]


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda s: f"{s.bits}-{s.granularity}-{s.symmetric}")
@pytest.mark.parametrize("modulation", [None, Modulation()], ids=["ptq", "modiff"])
@pytest.mark.parametrize("target", [meta, lambda: Denoiser(seed=7)], ids=["meta", "full"])
def test_outputs_are_the_same_bit_for_bit(tmp_path, weight, modulation, target):
    student = saved(tmp_path / "ckpt", QuantConfig(weight, QuantSpec(4, "sample"), modulation))
    model = target()
    loaded = modiff.load(tmp_path / "ckpt", model)
    assert loaded is model
    assert torch.equal(sample(loaded), sample(student))
    assert str(modiff.describe(loaded)) == str(modiff.describe(student))
    assert not torch.equal(sample(student), sample(Denoiser()))


def test_rules_skips_and_full_precision_sides_survive(tmp_path):
    rules = (
        Rule("conv_in", skip=True),
        Rule("conv_out", weight=None),
        Rule("time", activation=None, weight=QuantSpec(2, "tensor")),
        Rule("blocks.1", modulation=None),
    )
    config = QuantConfig(QuantSpec(4, "channel"), QuantSpec(6, "sample", clip=0.7), Modulation(warmup="refine"), rules)
    student = saved(tmp_path / "ckpt", config)
    loaded = modiff.load(tmp_path / "ckpt", meta())
    assert torch.equal(sample(loaded), sample(student))
    assert loaded._modiff_record.config == config
    assert loaded.blocks[0] is loaded.blocks[1]


def test_config_json_says_what_the_checkpoint_is(tmp_path):
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a32-ptq-paper"))
    where = modiff.save(student, tmp_path / "ckpt", teacher="hub/teacher")
    assert where == (tmp_path / "ckpt").resolve()
    manifest = json.loads((where / CONFIG).read_text())
    assert manifest["format_version"] == 2
    assert manifest["teacher"] == "hub/teacher"
    assert manifest["denoiser"]["class"].endswith("Denoiser")
    assert manifest["denoiser"]["config"]["width"] == 8
    assert manifest["quant_config"]["activation"] is None
    assert QuantConfig.from_dict(manifest["quant_config"]) == QuantConfig.preset("w4a32-ptq-paper")
    assert manifest["versions"]["torch"] == torch.__version__
    tensors = load_file(where / TENSORS)
    assert set(manifest["tensors"]) == set(tensors)
    assert tensors["conv_in.weight.codes"].numel() == 8 * 3 * 9 // 2
    assert "conv_in.weight" not in tensors
    assert "blocks.1.bias" not in tensors  # the shared module is stored once


def test_the_remainder_takes_the_dtype_asked_for(tmp_path):
    student = saved(tmp_path / "as_is")
    modiff.save(student, tmp_path / "half", dtype="float16")
    tensors = load_file(tmp_path / "half" / TENSORS)
    assert tensors["norm.weight"].dtype == torch.float16
    assert tensors["count"].dtype == torch.int64
    assert tensors["conv_in.weight.scale"].dtype == torch.float32
    assert load_file(tmp_path / "as_is" / TENSORS)["norm.weight"].dtype == torch.float32
    loaded = modiff.load(tmp_path / "half", meta())
    assert loaded.norm.weight.dtype == torch.float32
    assert torch.equal(loaded.shift, student.shift.half().float())
    with pytest.raises(ConfigError, match=r"dtype is 'int8'; allowed are float32"):
        modiff.save(student, tmp_path / "no", dtype="int8")
    with torch.no_grad():
        student.norm.weight[0] = 1e6
    with pytest.raises(CheckpointError, match=r"'norm.weight' holds values beyond float16"):
        modiff.save(student, tmp_path / "no", dtype=torch.float16)
    assert not (tmp_path / "no").exists()


def test_a_half_precision_student_comes_back_in_half_precision(tmp_path):
    student = modiff.quantize(Denoiser().to(torch.bfloat16), QuantConfig.preset("w4a6-modiff-paper"))
    modiff.save(student, tmp_path / "ckpt")
    for model in (meta(), Denoiser(seed=3).to(torch.bfloat16)):
        loaded = modiff.load(tmp_path / "ckpt", model)
        assert loaded.conv_in.weight.dtype == torch.bfloat16
        assert torch.equal(sample(loaded, dtype=torch.bfloat16), sample(student, dtype=torch.bfloat16))


def test_a_double_precision_student_comes_back_in_double_precision(tmp_path):
    student = modiff.quantize(Denoiser().double(), QuantConfig.preset("w7a6-modiff-paper"))
    assert student.conv_in.quantized_weight().dtype == torch.float64
    modiff.save(student, tmp_path / "ckpt")
    for model in (meta(), Denoiser(seed=3).double()):
        loaded = modiff.load(tmp_path / "ckpt", model)
        assert torch.equal(sample(loaded, dtype=torch.float64), sample(student, dtype=torch.float64))


def test_layout_is_kept_from_a_meta_model_and_by_moves(tmp_path):
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a6-ptq-paper")).to(memory_format=torch.channels_last)
    assert student.conv_in.quantized_weight().is_contiguous(memory_format=torch.channels_last)
    modiff.save(student, tmp_path / "ckpt")
    loaded = modiff.load(tmp_path / "ckpt", meta()).to(torch.float32)
    assert loaded.conv_in.quantized_weight().is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sample(loaded), sample(student))


def test_a_meta_model_never_holds_full_precision_weights(tmp_path):
    saved(tmp_path / "ckpt")
    loaded = modiff.load(tmp_path / "ckpt", meta())
    operators = {module for module in loaded.modules() if hasattr(module, "packed")}
    assert len(operators) == 5
    assert not any(slot.tensor.is_meta for slot in slots(loaded))
    assert all(op.module.weight.numel() == 0 and op._quantized_weight is None for op in operators)
    assert loaded.conv_in.weight.shape == (8, 3, 3, 3)


def test_the_cost_counts_the_bytes_that_are_stored(tmp_path):
    spec = QuantSpec(3, "group", symmetric=False, group_size=3)
    students = [saved(tmp_path / "ckpt", QuantConfig(spec)), modiff.load(tmp_path / "ckpt", meta())]
    stored = load_file(tmp_path / "ckpt" / TENSORS)
    expected = sum(t.numel() * t.element_size() for name, t in stored.items() if name not in ("shift", "count"))
    for student in students:
        assert modiff.cost(student, torch.zeros(1, 3, 6, 6), torch.zeros(1)).weight_mib * 2**20 == expected


class DictConfig:
    def to_dict(self):
        return {"width": 8, "dtype": torch.float16}


@dataclasses.dataclass
class DataConfig:
    width: int = 8


@pytest.mark.parametrize(
    ("config", "expected"),
    [(DictConfig(), {"width": 8, "dtype": "torch.float16"}), (DataConfig(), {"width": 8}), (None, None), (3, None)],
)
def test_configurations_of_every_habit_are_written(tmp_path, config, expected):
    model = Denoiser()
    model.config = config
    modiff.save(modiff.quantize(model, QuantConfig.preset("w4a4-ptq-paper")), tmp_path / "ckpt")
    assert json.loads((tmp_path / "ckpt" / CONFIG).read_text())["denoiser"]["config"] == expected
    other = Denoiser()
    other.config = config
    assert modiff.load(tmp_path / "ckpt", other) is other


def test_buffers_of_every_kind_survive(tmp_path):
    values = {
        "rotations": torch.randn(3, 2, dtype=torch.complex64),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "strided": torch.randn(4, 3, 2, 2).transpose(0, 1)[:, ::2],
        "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }

    def model(fill) -> Denoiser:
        denoiser = Denoiser()
        for name, value in values.items():
            denoiser.register_buffer(name, fill(value), persistent=name != "mask")
        return denoiser

    modiff.save(modiff.quantize(model(lambda v: v), QuantConfig.preset("w4a4-ptq-paper")), tmp_path / "ckpt")
    for fill in (torch.zeros_like, lambda v: v.to("meta")):
        loaded = modiff.load(tmp_path / "ckpt", model(fill))
        for name, value in values.items():
            assert torch.equal(loaded.get_buffer(name), value)
            assert loaded.get_buffer(name).dtype == value.dtype
        assert loaded.last.is_contiguous(memory_format=torch.channels_last)


def test_a_diffusers_network_under_inference_mode(tmp_path):
    def run(student):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with modiff.trajectory(student):
            return torch.stack([student(x / i, torch.tensor(i)).sample for i in (3, 2, 1)])

    student = modiff.quantize(tiny_unet(), QuantConfig.preset("w3a4-modiff-paper"))
    modiff.save(student, tmp_path / "ckpt")
    with torch.device("meta"):
        empty = tiny_unet()
    with torch.inference_mode():
        loaded = modiff.load(tmp_path / "ckpt", empty)
        assert torch.equal(run(loaded), run(student))
    assert torch.equal(run(loaded), run(student))
    refuses(tmp_path / "ckpt", "attention_head_dim is 8 in the checkpoint, and 4 in", tiny_unet(attention_head_dim=4))
    assert torch.equal(modiff.restore(loaded, teacher=tiny_unet()).conv_in.weight, tiny_unet().conv_in.weight)


def test_a_loaded_student_saves_copies_and_moves(tmp_path):
    student = saved(tmp_path / "first")
    loaded = modiff.load(tmp_path / "first", meta())
    modiff.save(loaded, tmp_path / "second")
    files = [(tmp_path / name / TENSORS).read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert torch.equal(sample(copy.deepcopy(loaded).cpu()), sample(student))


def test_state_dicts_of_loaded_students(tmp_path):
    student = saved(tmp_path / "ckpt")
    wanted = sample(student)
    for model in (meta(), Denoiser(seed=3)):
        loaded = modiff.load(tmp_path / "ckpt", model)
        loaded.load_state_dict(loaded.state_dict())
        assert torch.equal(sample(loaded), wanted)
        with pytest.raises(RuntimeError, match="size mismatch for conv_out.module.weight"):
            loaded.load_state_dict({**student.state_dict(), "conv_out.module.weight": torch.zeros(1)})
        other = modiff.quantize(Denoiser(seed=9), QuantConfig.preset("w4a4-modiff-paper"))
        loaded.load_state_dict(other.state_dict())
        assert torch.equal(loaded.conv_in.quantized_weight(), other.conv_in.quantized_weight())
        assert loaded.conv_in.dropped == (loaded.conv_in.module.weight.numel() == 0)


def test_restoring_gives_the_teacher_back(tmp_path):
    teacher = Denoiser()
    saved(tmp_path / "ckpt", dtype="float16")
    for model in (meta(), Denoiser(seed=4)):
        loaded = modiff.load(tmp_path / "ckpt", model)
        with pytest.raises(ConfigError, match=r"was loaded. Give the teacher: restore\(student, teacher="):
            modiff.restore(loaded)
        with pytest.raises(ConfigError, match=r"the student has shift \[8\], the teacher \[4\] on cpu"):
            modiff.restore(loaded, teacher=Denoiser(width=4))
        with pytest.raises(
            ConfigError, match="no full-precision operator 'conv_in'.*restore it first if it is a student"
        ):
            modiff.restore(loaded, teacher=modiff.quantize(Denoiser(), QuantConfig.preset("w8a8-ptq")))
        restored = modiff.restore(loaded, teacher=teacher)
        assert torch.equal(sample(restored), sample(teacher))
        assert type(restored.conv_in) is nn.Conv2d
        assert restored.conv_in.weight.data_ptr() != teacher.conv_in.weight.data_ptr()
        assert restored.blocks[0] is restored.blocks[1]


def test_a_model_that_was_the_teacher_restores_from_itself(tmp_path):
    saved(tmp_path / "ckpt", dtype="bfloat16")
    unet = Denoiser()
    before = sample(unet)
    student = modiff.load(tmp_path / "ckpt", unet)
    assert torch.equal(sample(modiff.restore(student, teacher=unet)), before)
    student = modiff.load(tmp_path / "ckpt", unet, keep_teacher=False)
    assert student.conv_in.module.weight.numel() == 0
    with pytest.raises(ConfigError, match="the student itself, whose weights were not kept"):
        modiff.restore(student, teacher=unet)


def test_saving_inside_a_trajectory_or_without_a_student_is_refused(tmp_path):
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a4-modiff-paper"))
    with modiff.trajectory(student), pytest.raises(TrajectoryError, match="cannot be saved inside a trajectory"):
        modiff.save(student, tmp_path / "ckpt")
    with pytest.raises(TrajectoryError, match="is not a student"):
        modiff.save(Denoiser(), tmp_path / "ckpt")
    with pytest.raises(ConfigError, match="teacher is a Denoiser; give a name"):
        modiff.save(student, tmp_path / "ckpt", teacher=Denoiser())
    assert os.listdir(tmp_path) == []


def test_existing_targets_are_refused_unless_overwritten(tmp_path):
    target = tmp_path / "ckpt"
    target.mkdir()
    saved(target)  # an empty directory will do
    eight = modiff.quantize(Denoiser(), QuantConfig.preset("w8a8-ptq"))
    with pytest.raises(CheckpointError, match="holds a checkpoint already.*overwrite=True"):
        modiff.save(eight, target)
    modiff.save(eight, target, overwrite=True)
    assert torch.equal(sample(modiff.load(target, meta())), sample(eight))
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of modiff \(notes.txt\), which are never overwritten"):
        modiff.save(eight, target, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a directory"):
        modiff.save(eight, target / "notes.txt", overwrite=True)
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize(("when", "error"), [("tensors", OSError), ("tensors", SafetensorError), ("rename", OSError)])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, when, error):
    student = saved(tmp_path / "ckpt")

    def fail(*args, **kwargs):
        raise error("disk full")

    if when == "tensors":
        monkeypatch.setattr("modiff.storage.folder.save_file", fail)
    else:
        replace = os.replace
        monkeypatch.setattr(
            "modiff.storage.atomic.os.replace",
            lambda a, b: fail() if os.path.basename(b) == "ckpt" and not str(a).endswith(".old") else replace(a, b),
        )
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        modiff.save(modiff.quantize(Denoiser(), QuantConfig.preset("w8a8-ptq")), tmp_path / "ckpt", overwrite=True)
    assert os.listdir(tmp_path) == ["ckpt"]
    assert torch.equal(sample(modiff.load(tmp_path / "ckpt", meta())), sample(student))


def test_dropping_the_teacher_leaves_tied_weights_alone():
    teacher = Denoiser()
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w3a32-ptq-paper"), keep_teacher=False)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    kept = modiff.quantize(Denoiser(), QuantConfig.preset("w3a32-ptq-paper"))
    assert torch.equal(sample(student), sample(kept))
    assert torch.equal(sample(modiff.restore(student, teacher=teacher)), sample(teacher))
