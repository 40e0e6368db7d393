"""Checkpoints that are missing, damaged, edited, of another model or another release are refused, and why is said."""

import dataclasses
import json

import pytest
import torch
from checkpoints import Denoiser, meta, refuses, sample, saved
from safetensors.torch import load_file, save_file
from torch import nn

import modiff
from modiff.config.quant import QuantConfig
from modiff.errors import CheckpointError, ConfigError
from modiff.storage.folder import CONFIG, TENSORS


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


DAMAGED = r"is damaged|is truncated|is not of a checkpoint|has format version|: tensor '.*' is (missing|not known)"


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
            with pytest.raises(CheckpointError, match=DAMAGED):
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
    student = modiff.quantize(Denoiser(), QuantConfig.preset("w4a4-ptq-paper"))
    real = dataclasses.asdict
    monkeypatch.setattr(
        "modiff.student.checkpoint.dataclasses.asdict", lambda config: {**real(config), "sparsity": 0.5}
    )
    modiff.save(student, tmp_path / "ckpt")
    refuses(tmp_path / "ckpt", "its quantization is not known to this release: QuantConfig has no field 'sparsity'")


def test_students_and_meta_models_where_they_cannot_serve(tmp_path):
    student = saved(tmp_path / "ckpt")
    with pytest.raises(ConfigError, match="is a student already"):
        modiff.load(tmp_path / "ckpt", student)
    with pytest.raises(ConfigError, match=r"'conv_in' is on the meta device.*modiff.load"):
        modiff.quantize(meta(), QuantConfig.preset("w4a4-ptq-paper"))
    broken = Denoiser()
    with torch.no_grad():
        broken.conv_out.weight[0, 0] = float("nan")
    before = sample(Denoiser())
    with pytest.raises(ConfigError, match="weight of operator 'conv_out' holds NaN or Inf"):
        modiff.quantize(broken, QuantConfig.preset("w4a4-ptq-paper"), keep_teacher=False)
    with torch.no_grad():
        broken.conv_out.weight.copy_(Denoiser().conv_out.weight)
    assert torch.equal(sample(broken), before)
