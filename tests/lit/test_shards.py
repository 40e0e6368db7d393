"""Images as shards, and the metrics that are made from them without drawing."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modiff.errors import CheckpointError, ConfigError
from modiff.lit.modules.student import LitStudent
from modiff.lit.runs.batch_store import BatchStore
from modiff.lit.runs.shards import ShardStore, ShardWriter, say_disk_need
from modiff.metrics.pairwise import mean_psnr_db

FAST = ("--timing_rounds", "0", "--error_images", "0", "--num_images", "10")


@pytest.mark.parametrize("kind", ["tar", "npz"])
def test_metrics_come_from_shards_without_drawing(modiff, recipe, tmp_path, monkeypatch, kind) -> None:
    args = ("evaluate", "--config", recipe, *FAST, "--sample_count", "10")
    code, _, err = modiff(*args, "--shards", kind, "--shard_images", "8", "--output", tmp_path / "drawn")
    assert code == 0, err
    shards = tmp_path / "drawn" / "shards"
    assert sorted(f.name for f in shards.iterdir()) == [f"shard-00000{i}.{kind}" for i in range(2)] + ["shards.json"]

    def refuse(*_) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr(LitStudent, "draw", refuse)
    code, said, err = modiff(*args, "--from-images", shards, "--output", tmp_path / "read")
    assert code == 0, err
    drawn, read = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("drawn", "read"))
    assert read["num_images"] == 10
    assert read["evaluations"] == drawn["evaluations"]
    floats, bytes_ = (load_file(str(tmp_path / name / "samples.safetensors")) for name in ("drawn", "read"))
    # Shards hold 8 bits: the figures are exactly those of the rounded images.
    assert len(floats["student"]) == 10
    student, teacher = ((floats[who].clamp(0, 1) * 255).round() / 255 for who in ("student", "teacher"))
    assert read["student"]["psnr_db"] == pytest.approx(mean_psnr_db(student, teacher), abs=1e-4)
    assert read["student"]["relative_l2"] == pytest.approx(drawn["student"]["relative_l2"], rel=0.05)
    assert torch.allclose(floats["student"], bytes_["student"], atol=0.5 / 255 + 1e-6)
    assert "Report:" in said


def stored(folder, count: int, batch: int) -> BatchStore:
    store = BatchStore(folder)
    for first in range(0, count, batch):
        x = torch.linspace(-1, 1, batch * 48).reshape(batch, 3, 4, 4) * (first + 1) / count
        store.save(first, {"teacher": x, "student": -x}, {"evaluations": 4, "quantized": 3})
    return store


def test_tar_has_the_layout_of_webdataset_and_the_same_bytes_each_time(tmp_path) -> None:
    store = stored(tmp_path / "partial", 8, 4)
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, "tar", 1000, 4, 7)
        writer.batch_done(0, store)
        writer.batch_done(4, store)
    first, second = (tmp_path / name / "shard-000000.tar" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        names = tar.getnames()
        pixels = np.array(Image.open(tar.extractfile("00000005.student.png")))
    assert names[:3] == ["00000000.teacher.png", "00000000.student.png", "00000000.json"]
    assert len(names) == 3 * 7  # the surplus image of the last batch is no part of it
    expected = store.load(4)[0]["student"][1]
    assert np.array_equal(pixels, ((expected / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy())


def test_npz_is_what_evaluators_read(tmp_path) -> None:
    writer = ShardWriter(tmp_path / "s", "npz", 4, 4, 8)
    writer.finish(stored(tmp_path / "partial", 8, 4))
    with np.load(tmp_path / "s" / "shard-000001.npz") as file:
        assert file["arr_0"].shape == (4, 4, 4, 3)
        assert file["arr_0"].dtype == np.uint8
        assert file["index"].tolist() == [4, 5, 6, 7]
    store = ShardStore(tmp_path / "s", 3)  # batches need not be those that were drawn
    images, facts = store.load(3)
    assert images["teacher"].shape == (3, 3, 4, 4)
    assert facts == {"evaluations": 4, "quantized": 3}
    whole = torch.cat([store.load(0)[0]["student"], images["student"], store.load(6)[0]["student"]])[:8]
    drawn = torch.cat([stored(tmp_path / "partial", 8, 4).load(i)[0]["student"] for i in (0, 4)])
    assert torch.allclose(whole, drawn.clamp(-1, 1), atol=1 / 255 + 1e-6)


def test_incomplete_shard_waits_for_its_batches(tmp_path) -> None:
    store = stored(tmp_path / "partial", 4, 4)
    ShardWriter(tmp_path / "s", "tar", 8, 4, 8).batch_done(0, store)
    assert not (tmp_path / "s").exists()


def test_wrong_shards_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no shards.json. Give the folder `shards` of a run"):
        ShardStore(tmp_path, 4)
    ShardWriter(tmp_path / "s", "tar", 8, 4, 8).finish(stored(tmp_path / "partial", 8, 4))
    store = ShardStore(tmp_path / "s", 4)
    with pytest.raises(ConfigError, match=r"holds images \[3, 4, 4\]; the teacher draws \[1, 8, 8\]"):
        store.check(8, (1, 8, 8))
    with pytest.raises(ConfigError, match=r"num_images is 9, but --from_images .* holds 8. Ask for fewer"):
        store.check(9, (3, 4, 4))
    (tmp_path / "s" / "shard-000000.tar").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"shard-000000.tar is missing or damaged .* Draw it again"):
        store.load(0)


def test_run_that_cannot_fit_on_the_disk_is_refused_beforehand(tmp_path, capsys) -> None:
    say_disk_need(tmp_path, 2**20)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"needs up to 1073741824.00 GiB on the disk, .* Free some, draw fewer"):
        say_disk_need(tmp_path / "new", 2**60)
