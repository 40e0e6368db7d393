"""A checkpoint gives the same outputs bit for bit, or an error that says what is wrong: never half a model."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import modiff
from modiff.config import Modulation, QuantConfig, QuantSpec, Rule
from modiff.errors import CheckpointError, ConfigError, TrajectoryError
from modiff.layers.slots import slots
from modiff.storage import CONFIG, TENSORS


class Denoiser(nn.Module):
    """Convolutions (one grouped, one shared), Linear, norms, tied weights, and a buffer that no state dict holds."""

    def __init__(self, width: int = 8, seed: int = 0, heads: int = 2) -> None:
        super().__init__()
        self.config = {"width": width, "heads": heads, "_name_or_path": f"seed {seed}", "sample_size": 6}
        torch.manual_seed(seed)
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, groups=2)] * 2)
        self.norm = nn.GroupNorm(2, width)
        self.time = nn.Linear(1, width)
        self.tied = nn.Linear(width, width, bias=False)
        self.embedding = nn.Embedding(width, width)
        self.embedding.weight = self.tied.weight
        self.conv_out = nn.Conv2d(width, 3, 1)
        self.register_buffer("shift", torch.randn(width), persistent=False)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x) + self.time(t[:, None].to(x.dtype))[:, :, None, None] + self.shift[:, None, None]
        for block in self.blocks:
            h = h + block(self.norm(h).tanh())
        h = h + self.tied(h.mean(dim=(2, 3)) + self.embedding.weight[0])[:, :, None, None]
        return self.conv_out(h)


def sample(model: nn.Module, evaluations: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A trajectory of a student or teacher."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5)).to(dtype)
    outputs = []

    def loop(x: torch.Tensor) -> None:
        for t in reversed(range(evaluations)):
            outputs.append(model(x, torch.full((2,), t / evaluations)))
            x = x - 0.2 * outputs[-1]

    if hasattr(model, "_modiff_state"):
        with modiff.trajectory(model):
            loop(x)
    else:
        with torch.no_grad():
            loop(x)
    return torch.stack(outputs)


def meta(width: int = 8) -> Denoiser:
    with torch.device("meta"):
        return Denoiser(width)


def saved(path, config="w4a4-modiff", dtype=None, **kwargs):
    config = QuantConfig.preset(config) if isinstance(config, str) else config
    student = modiff.quantize(Denoiser(**kwargs), config)
    modiff.save(student, path, dtype=dtype)
    return student


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
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a32-ptq"))
    where = modiff.save(student, tmp_path / "ckpt", teacher="hub/teacher")
    assert where == (tmp_path / "ckpt").resolve()
    manifest = json.loads((where / CONFIG).read_text())
    assert manifest["format_version"] == 2
    assert manifest["teacher"] == "hub/teacher"
    assert manifest["denoiser"]["class"].endswith("Denoiser")
    assert manifest["denoiser"]["config"]["width"] == 8
    assert manifest["quant_config"]["activation"] is None
    assert QuantConfig.from_dict(manifest["quant_config"]) == QuantConfig.preset("w4a32-ptq")
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
    student = modiff.quantize(Denoiser().to(torch.bfloat16), QuantConfig.preset("w4a6-modiff"))
    modiff.save(student, tmp_path / "ckpt")
    for model in (meta(), Denoiser(seed=3).to(torch.bfloat16)):
        loaded = modiff.load(tmp_path / "ckpt", model)
        assert loaded.conv_in.weight.dtype == torch.bfloat16
        assert torch.equal(sample(loaded, dtype=torch.bfloat16), sample(student, dtype=torch.bfloat16))


def test_a_double_precision_student_comes_back_in_double_precision(tmp_path):
    student = modiff.quantize(Denoiser().double(), QuantConfig.preset("w7a6-modiff"))
    assert student.conv_in.quantized_weight().dtype == torch.float64
    modiff.save(student, tmp_path / "ckpt")
    for model in (meta(), Denoiser(seed=3).double()):
        loaded = modiff.load(tmp_path / "ckpt", model)
        assert torch.equal(sample(loaded, dtype=torch.float64), sample(student, dtype=torch.float64))


def test_layout_is_kept_from_a_meta_model_and_by_moves(tmp_path):
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a6-ptq")).to(memory_format=torch.channels_last)
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
    modiff.save(modiff.quantize(model, QuantConfig.preset("w4a4-ptq")), tmp_path / "ckpt")
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

    modiff.save(modiff.quantize(model(lambda v: v), QuantConfig.preset("w4a4-ptq")), tmp_path / "ckpt")
    for fill in (torch.zeros_like, lambda v: v.to("meta")):
        loaded = modiff.load(tmp_path / "ckpt", model(fill))
        for name, value in values.items():
            assert torch.equal(loaded.get_buffer(name), value)
            assert loaded.get_buffer(name).dtype == value.dtype
        assert loaded.last.is_contiguous(memory_format=torch.channels_last)


def test_a_diffusers_network_under_inference_mode(tmp_path):
    from diffusers import UNet2DModel

    def unet(**changes):
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
        return UNet2DModel(sample_size=8, **{**blocks, **sizes, **changes}).eval()

    def run(student):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with modiff.trajectory(student):
            return torch.stack([student(x / i, torch.tensor(i)).sample for i in (3, 2, 1)])

    student = modiff.quantize(unet(), QuantConfig.preset("w3a4-modiff"))
    modiff.save(student, tmp_path / "ckpt")
    with torch.device("meta"):
        empty = unet()
    with torch.inference_mode():
        loaded = modiff.load(tmp_path / "ckpt", empty)
        assert torch.equal(run(loaded), run(student))
    assert torch.equal(run(loaded), run(student))
    refuses(tmp_path / "ckpt", "attention_head_dim is 8 in the checkpoint, and 4 in", unet(attention_head_dim=4))
    assert torch.equal(modiff.restore(loaded, teacher=unet()).conv_in.weight, unet().conv_in.weight)


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
        other = modiff.quantize(Denoiser(seed=9), QuantConfig.preset("w4a4-modiff"))
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
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a4-modiff"))
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
        monkeypatch.setattr("modiff.storage.save_file", fail)
    else:
        replace = os.replace
        monkeypatch.setattr(
            "modiff.storage.os.replace",
            lambda a, b: fail() if os.path.basename(b) == "ckpt" and not str(a).endswith(".old") else replace(a, b),
        )
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        modiff.save(modiff.quantize(Denoiser(), QuantConfig.preset("w8a8-ptq")), tmp_path / "ckpt", overwrite=True)
    assert os.listdir(tmp_path) == ["ckpt"]
    assert torch.equal(sample(modiff.load(tmp_path / "ckpt", meta())), sample(student))


def refuses(path, match: str, model: nn.Module | None = None) -> None:
    """Loading raises, and leaves the model as it was, on a full and on a meta model."""
    for target in [model] if model is not None else [Denoiser(seed=2), meta()]:
        before = {slot.name: slot.tensor for slot in slots(target)}
        modules = list(target.modules())
        with pytest.raises(CheckpointError, match=match):
            modiff.load(path, target)
        assert all(slot.tensor is before[slot.name] for slot in slots(target))
        assert list(target.modules()) == modules
        assert not hasattr(target, "_modiff_state")


def test_missing_and_foreign_directories_are_refused(tmp_path):
    refuses(tmp_path / "nowhere", "nowhere does not exist")
    refuses(tmp_path, "config.json does not exist")
    (tmp_path / CONFIG).write_text('{"_class_name": "UNet2DModel"}')
    refuses(tmp_path, "model.safetensors does not exist")
    (tmp_path / TENSORS).write_bytes(b"")
    refuses(tmp_path, "is not of a checkpoint of modiff")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, file, keep):
    saved(tmp_path / "ckpt")
    content = (tmp_path / "ckpt" / file).read_bytes()
    (tmp_path / "ckpt" / file).write_bytes(content[: int(len(content) * keep)])
    refuses(tmp_path / "ckpt", "is truncated" if file == TENSORS else "is damaged")


def test_trailing_bytes_are_refused(tmp_path):
    saved(tmp_path / "ckpt")
    with open(tmp_path / "ckpt" / TENSORS, "ab") as file:
        file.write(b"\0")
    refuses(tmp_path / "ckpt", "is too long: [0-9]+ bytes of")


def test_any_flipped_bit_is_refused(tmp_path):
    saved(tmp_path / "ckpt")
    generator = torch.Generator().manual_seed(0)
    for file in (CONFIG, TENSORS):
        target = tmp_path / "ckpt" / file
        content = target.read_bytes()
        places = [*range(9), *torch.randint(0, len(content), (120,), generator=generator).tolist(), len(content) - 2]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
            target.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                modiff.load(tmp_path / "ckpt", Denoiser())
        target.write_bytes(content)


def test_a_damaged_tensor_is_named(tmp_path):
    saved(tmp_path / "ckpt")
    target = tmp_path / "ckpt" / TENSORS
    content = bytearray(target.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    place = 8 + int.from_bytes(content[:8], "little") + header["time.weight.codes"]["data_offsets"][0]
    content[place] ^= 16
    target.write_bytes(content)
    refuses(tmp_path / "ckpt", "tensor 'time.weight.codes' is damaged: its hash differs")


def test_missing_unknown_and_rewritten_tensors_are_refused(tmp_path):
    saved(tmp_path / "ckpt")
    target = tmp_path / "ckpt" / TENSORS
    tensors = load_file(target)
    save_file({k: v for k, v in tensors.items() if k != "norm.bias"}, target)
    refuses(tmp_path / "ckpt", "tensor 'norm.bias' is missing")
    save_file({**tensors, "extra": torch.zeros(1)}, target)
    refuses(tmp_path / "ckpt", "tensor 'extra' is not known")
    save_file(tensors, target, metadata={"edited": "yes"})
    refuses(tmp_path / "ckpt", "its header is damaged or was edited")


def edit(path, **fields) -> None:
    manifest = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**manifest, **fields}))


def test_other_versions_and_edits_are_refused(tmp_path):
    saved(tmp_path / "ckpt")
    edit(tmp_path / "ckpt", teacher="another")
    refuses(tmp_path / "ckpt", "is damaged or was edited: its hash differs")
    edit(tmp_path / "ckpt", format_version=3, requires="modiff>=3.1", versions={"modiff": "3.2"})
    refuses(
        tmp_path / "ckpt",
        r"format version 3; this release of modiff reads versions 1 and 2. "
        r"It needs modiff>=3.1 \(written by modiff 3.2\): install that release",
    )


def test_other_architectures_are_refused_by_key_and_shape(tmp_path):
    saved(tmp_path / "ckpt")
    refuses(
        tmp_path / "ckpt",
        r"'shift' has shape \[8\] in the checkpoint, and has shape \[4\] in this Denoiser",
        Denoiser(width=4),
    )
    more = Denoiser()
    more.extra = nn.Linear(2, 2)
    refuses(tmp_path / "ckpt", "'extra.weight' is missing in the checkpoint, and has shape", more)
    fewer = meta()
    del fewer.norm
    refuses(tmp_path / "ckpt", r"'norm.weight' has shape \[8\] in the checkpoint, and is missing", fewer)


def test_other_networks_with_the_same_tensors_are_refused(tmp_path):
    class Other(Denoiser):
        pass

    saved(tmp_path / "ckpt")
    refuses(tmp_path / "ckpt", "heads is 2 in the checkpoint, and 4 in this Denoiser", Denoiser(heads=4))
    refuses(tmp_path / "ckpt", "is of a .*Denoiser, but the model is a .*Other", Other())
    skipped = Denoiser()
    skipped.time.forward = skipped.time.forward  # an instance attribute changes nothing
    skipped.time.__class__ = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 2 * self.weight.T})
    refuses(tmp_path / "ckpt", "the weight of operator 'time' is quantized in the checkpoint only", skipped)
    loose = meta()
    loose.norm.table = torch.zeros(3, device="meta")
    refuses(tmp_path / "ckpt", "norm.table is a tensor on the meta device that is neither parameter nor buffer", loose)
    bigger = Denoiser()
    bigger.config["sample_size"] = 64  # changes what is drawn, not what is computed
    assert modiff.load(tmp_path / "ckpt", bigger) is bigger


def test_a_quantization_of_a_later_release_is_refused(tmp_path, monkeypatch):
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a4-ptq"))
    real = dataclasses.asdict
    monkeypatch.setattr("modiff.checkpoint.dataclasses.asdict", lambda config: {**real(config), "sparsity": 0.5})
    modiff.save(student, tmp_path / "ckpt")
    refuses(tmp_path / "ckpt", "its quantization is not known to this release: QuantConfig has no field 'sparsity'")


def test_students_and_meta_models_where_they_cannot_serve(tmp_path):
    student = saved(tmp_path / "ckpt")
    with pytest.raises(ConfigError, match="is a student already"):
        modiff.load(tmp_path / "ckpt", student)
    with pytest.raises(ConfigError, match=r"'conv_in' is on the meta device.*modiff.load"):
        modiff.quantize(meta(), QuantConfig.preset("w4a4-ptq"))
    broken = Denoiser()
    with torch.no_grad():
        broken.conv_out.weight[0, 0] = float("nan")
    before = sample(Denoiser())
    with pytest.raises(ConfigError, match="weight of operator 'conv_out' holds NaN or Inf"):
        modiff.quantize(broken, QuantConfig.preset("w4a4-ptq"), keep_teacher=False)
    with torch.no_grad():
        broken.conv_out.weight.copy_(Denoiser().conv_out.weight)
    assert torch.equal(sample(broken), before)


def test_dropping_the_teacher_leaves_tied_weights_alone():
    teacher = Denoiser()
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w3a32-ptq"), keep_teacher=False)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    kept = modiff.quantize(Denoiser(), QuantConfig.preset("w3a32-ptq"))
    assert torch.equal(sample(student), sample(kept))
    assert torch.equal(sample(modiff.restore(student, teacher=teacher)), sample(teacher))
