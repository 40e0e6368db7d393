"""Classes and prompts by index, teachers by name, and one plain sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import modiff
from modiff.errors import CheckpointError, ConfigError
from modiff.lit.data.conditions import LabelDataModule, PromptDataModule, SampleDataModule
from modiff.lit.modules.student import LitStudent
from modiff.teachers.loading import find_family
from modiff.teachers.zoo import ZOO, TeacherSpec, load_teacher

PROMPTS = ["a cat", "two dogs", "a red, round house"]


@pytest.fixture(params=["txt", "csv", "tsv", "parquet"])
def prompts(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"prompts.{request.param}"
    if request.param == "txt":
        path.write_text("\n".join(["", *PROMPTS, "  "]))
    elif request.param == "parquet":
        captions = [[text, "another caption of the same image"] for text in PROMPTS]
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3], "captions": captions}), path)
    else:
        mark = "," if request.param == "csv" else "\t"
        path.write_text("\n".join([f"id{mark}caption", *(f'{i}{mark}"{text}"' for i, text in enumerate(PROMPTS))]))
    return path


def test_prompts_come_in_turn_by_index(prompts) -> None:
    data = PromptDataModule(str(prompts), batch_size=2, num_images=5)
    assert data.conditions([4, 0, 2]) == [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    assert data.identity() == SampleDataModule(prompts=str(prompts)).identity() != {}


def test_labels_come_in_turn_by_index(tmp_path) -> None:
    (tmp_path / "labels.csv").write_text("label\n3\n1\n")
    from_file, from_list = LabelDataModule(str(tmp_path / "labels.csv")), LabelDataModule([3, 1])
    assert from_file.conditions([0, 1, 2]) == from_list.conditions([0, 1, 2]) == [3, 1, 3]
    assert from_file.identity() == from_list.identity() != LabelDataModule([1, 3]).identity()


def test_without_conditions_the_identity_of_a_run_is_what_it_was() -> None:
    assert SampleDataModule().identity() == {}
    assert SampleDataModule().conditions([0]) is None


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"prompts": "p.txt"}, "\n \n", r"p\.txt is empty\. Give a file with at least one entry"),
        ({"prompts": "p.csv"}, "", r"p\.csv is empty"),
        ({"prompts": "p.csv"}, "a,b\n1,2\n", r"has the columns a, b, none of prompt, caption.*--data\.column"),
        ({"prompts": "p.csv", "column": "c"}, "a,b\n1,2\n", r"has the columns a, b, 'c' asked for"),
        ({"prompts": "p.csv"}, "prompt\n\nx\n , \n", r"prompt '' is no text"),
        ({"prompts": "gone.txt"}, None, r"gone\.txt does not exist\. Give a text, CSV or parquet file"),
        ({"prompts": "gone.parquet"}, None, r"gone\.parquet does not exist"),
        ({"prompts": "p.parquet"}, "no parquet", r"p\.parquet is no parquet file"),
        ({"prompts": "p.txt", "labels": [1]}, "a", r"data\.labels and data\.prompts are both given"),
        ({"labels": []}, None, r"data\.labels is empty"),
        ({"labels": "l.txt"}, "1\ncat\n", r"label 'cat' is no whole number"),
    ],
)
def test_wrong_source(options, content, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        name = next(v for v in options.values() if isinstance(v, str))
        Path(name).write_text(content.replace(" , ", '""'))
    with pytest.raises(ConfigError, match=message):
        SampleDataModule(**options)


def test_data_set_that_is_not_here_fails_fast(monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    with pytest.raises(ConfigError, match=r"ConnectionError\)\. Give .* or run: hf download some/captions --repo-type"):
        PromptDataModule("some/captions")


def draw(name: str, labels: list[int] | None, guidance: float | None = None) -> torch.Tensor:
    module = LitStudent(TeacherSpec(name, tiny=True), preset="w8a4-modiff-paper", steps=2, guidance=guidance)
    module.prepare(conditions=SampleDataModule(labels=labels).conditions)
    with modiff.trajectory(module.student):
        return module.draw("student", torch.arange(2))[0]


def test_classes_and_guidance_change_the_images() -> None:
    in_turn = draw("dit-xl-2-256", None)
    assert torch.equal(in_turn, draw("dit-xl-2-256", [0, 1]))
    assert not torch.equal(in_turn, draw("dit-xl-2-256", [5, 1]))
    assert not torch.equal(in_turn, draw("dit-xl-2-256", [0, 1], guidance=3.0))


@pytest.fixture
def recipe_of_classes(tmp_path) -> Path:
    path = tmp_path / "classes.yaml"
    path.write_text(
        "num_images: 2\nwandb: disabled\n"
        "model: {teacher: {name: dit-xl-2-256, tiny: true}, steps: 2, guidance: 3.0}\n"
        "data: {batch_size: 2, labels: [5, 1]}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false}\n"
    )
    return path


def test_packed_student_of_a_conditional_teacher_draws_the_same_images(recipe_of_classes, tmp_path, modiff) -> None:
    recipe, preset = ("--config", recipe_of_classes), ("--model.preset", "w4a4-modiff-paper")
    for command in (
        ("quantize", *recipe, *preset, "--output", tmp_path / "packed"),
        ("sample", *recipe, *preset, "--output", tmp_path / "made"),
        ("sample", *recipe, "--ckpt", tmp_path / "packed", "--output", tmp_path / "loaded"),
        ("sample", *recipe, *preset, "--data.labels", "[5, 2]", "--output", tmp_path / "others"),
    ):
        status, _, err = modiff(*command)
        assert status == 0, err
    made, loaded, others = (
        [(tmp_path / run / "images" / "student" / f"{i:06d}.png").read_bytes() for i in range(2)]
        for run in ("made", "loaded", "others")
    )
    assert made == loaded
    assert [a == b for a, b in zip(made, others, strict=True)] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("labels: [5, 1]", "labels: [5, 2]"), "differ in their labels or prompts, so they have different teacher"),
        ((", labels: [5, 1]", ""), "differ in their labels or prompts"),
        (("guidance: 3.0", "guidance: 2.0"), "differ in guidance (3.0 and 2.0)"),
    ],
)
def test_recipes_of_other_conditions_are_not_compared(recipe_of_classes, tmp_path, modiff, change, message) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(recipe_of_classes.read_text().replace(*change))
    for pair in ((recipe_of_classes, other), (other, recipe_of_classes)):
        status, _, err = modiff(
            "compare", *pair, "--model.preset", "w8a4-modiff-paper", "--output", tmp_path / "out", "--wandb", "disabled"
        )
        assert status == 1
        assert message in err or message.replace("3.0 and 2.0", "2.0 and 3.0") in err


def test_text_teacher_takes_its_prompts_by_index() -> None:
    asked: list[tuple[list[str], bool]] = []
    module = LitStudent(TeacherSpec("sd-v1-4", tiny=True), steps=2)
    module.prepare(conditions=lambda indices: [PROMPTS[i] for i in indices])

    def encode(texts: list[str], guided: bool) -> dict[str, torch.Tensor]:
        asked.append((texts, guided))
        return {"encoder_hidden_states": torch.ones(2 * len(texts), 8, 16)}

    module.loaded.encode = encode
    module.draw("teacher", torch.tensor([2, 0]))
    assert asked == [([PROMPTS[2], PROMPTS[0]], True)]


@pytest.mark.parametrize(
    ("name", "conditions", "message"),
    [
        ("dit-xl-2-256", [1000], r"label 1000 is no class of this teacher; allowed are 0 to 999"),
        ("dit-xl-2-256", ["cat"], r"label 'cat' is no class"),
        ("ddpm-cifar10", [1], r"This teacher is unconditional, but data gives labels or prompts"),
    ],
)
def test_wrong_condition(name, conditions, message) -> None:
    teacher = load_teacher(TeacherSpec(name, tiny=True))
    with pytest.raises(ConfigError, match=message):
        teacher.conditioning([0], conditions, 1.0)


def test_text_teacher_without_prompts() -> None:
    teacher = load_teacher(TeacherSpec("sd-v1-4", tiny=True))
    teacher.encode = lambda texts, guided: {}
    with pytest.raises(ConfigError, match=r"draws from text, but data gives no prompts\. Give --data\.prompts"):
        teacher.conditioning([0], None, 1.0)


def test_guidance_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"guidance is 2\.0, but teacher 'ddpm-cifar10 \(tiny, random\)' takes none"):
        LitStudent(TeacherSpec("ddpm-cifar10", tiny=True), guidance=2.0).configure_model()
    with pytest.raises(ConfigError, match=r"guidance is -1; allowed are 0 or more"):
        LitStudent(guidance=-1)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.hub])
def test_teacher_that_is_not_here_names_its_download(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(CheckpointError, match=rf"Run: (hf auth login && )?hf download {ZOO[name].hub}"):
        load_teacher(TeacherSpec(name))


def test_teacher_without_a_hub_folder_says_how_it_is_made() -> None:
    with pytest.raises(CheckpointError, match=r"'ldm-church' has no diffusers folder on the hub: convert.*num_heads=8"):
        load_teacher(TeacherSpec("ldm-church"))


def test_pipeline_without_a_denoiser(tmp_path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(CheckpointError, match=r"does not exist, so the pipeline has no denoiser\. Give model"):
        load_teacher(TeacherSpec(path=str(tmp_path)))


def test_unknown_denoiser_names_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"denoiser is a Kandinsky, .* allowed are .*UNet2DModel.*quantize_pipeline"):
        find_family({"_class_name": "Kandinsky"}, has_decoder=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiny": True, "path": "x"}, "tiny and model.teacher.path are both given"),
        ({"image_size": 0}, "image_size is 0; allowed are whole numbers, 1 or more"),
        ({"name": "sd"}, "unknown teacher 'sd'; allowed are mnist, ddpm-cifar10"),
    ],
)
def test_wrong_spec(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        TeacherSpec(**fields)


def test_image_size_that_does_not_fit_the_model() -> None:
    with pytest.raises(ConfigError, match=r"image_size is 30, but this model draws multiples of 4 pixels\. .* 32"):
        load_teacher(TeacherSpec("ldm-church", tiny=True, image_size=30))
    assert load_teacher(TeacherSpec("ldm-church", tiny=True, image_size=32)).image_shape == (3, 32, 32)


@pytest.mark.parametrize(("column", "given"), [("captions", None), ("prompt", None), ("what", "what")])
def test_prompts_of_a_hugging_face_data_set(column, given, tmp_path, monkeypatch) -> None:
    """A data set's folder, read by the datasets library: captions as COCO's (several of an image) or one prompt."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: 1 / 0)
    values = [[text, "again"] for text in PROMPTS] if column == "captions" else PROMPTS
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({column: values}), tmp_path / "set" / "train-0.parquet")
    data = PromptDataModule(str(tmp_path / "set"), num_images=4, column=given)
    assert data.conditions([0, 1, 2, 3]) == [*PROMPTS, PROMPTS[0]]
    with pytest.raises(ConfigError, match="split 'validation' of a data set of that name is neither on the hub"):
        PromptDataModule(str(tmp_path / "set"), split="validation", column=given)
