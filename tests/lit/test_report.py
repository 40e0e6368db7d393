"""The pages of ``modiff evaluate`` and ``modiff compare``: what they hold, and that they ask nobody for anything."""

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modiff.errors import ConfigError
from modiff.lit.report.embedding import data_uri
from modiff.lit.report.pages import write_compare_report, write_report
from modiff.lit.report.rendering import picture
from modiff.lit.report.tables import markdown_table
from tests.lit.results import COST, ERRORS, METRICS, changed, nulls, result

VOID = {"meta", "img", "link", "br", "hr", "input"}
NASTY = "<script>alert(1)</script>\"'&"
SAMPLES = {who: torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i, who in enumerate("ts")}
COMPARED = {"full precision": SAMPLES["t"], "w8a4": SAMPLES["s"]}


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts, self.attributes, self.scripts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.attributes += [(tag, *pair) for pair in attrs]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script" and ("type", "application/json") not in attrs:
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1:] = [*self.scripts[-1:][:-1], data] if self.scripts else []
        elif self.open[-1:] != ["style"]:
            self.texts.append(data.strip())

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("trajectory_errors", "cost", "compare")):
        Image.new("L", (3 + i, 2)).save(tmp_path / f"{name}.png")
    save_file({"teacher": SAMPLES["t"], "student": SAMPLES["s"]}, tmp_path / "samples.safetensors")
    return tmp_path


def report(folder, found=None, recipe="w8a4_modiff", config_yaml="preset: null", description="conv_in  Conv2d"):
    given = {"recipe": recipe, "result": found or result(), "config_yaml": config_yaml, "description": description}
    return write_report(folder, **given).read_text(encoding="utf-8")


def compared(folder, rows, reports=None):
    return write_compare_report(folder, rows, COMPARED, reports).read_text(encoding="utf-8")


def test_pages_ask_nobody_for_anything(folder):
    for text in (report(folder), compared(folder, [("w8a4", result())])):
        seen = Page(text)
        outside = [a for a in seen.addresses if not a.startswith(("data:image/", "#"))]
        assert outside == []
        assert "link" not in seen.tags
        for word in ("url(", "@import", "http://", "https://"):
            assert word not in text.replace("http://www.w3.org/2000/svg", "")
        assert "prefers-color-scheme: dark" in text
        assert "@media print" in text


def test_policy_names_the_hash_of_every_script_and_nothing_else(folder):
    text = report(folder)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    assert len(hashes) == 7
    allowed = policy.replace("&#39;", "'").split("script-src ")[1].split(";")[0]
    assert allowed.split() == hashes
    assert "default-src" in policy
    assert "unsafe-inline" not in allowed


def test_report_shows_the_given_numbers_and_texts(folder):
    seen = Page(report(folder, config_yaml="activation:\n  bits: 4", description="mid.conv  W8A4"))
    for expected in (
        *("w8a4_modiff", "40.71 dB", "0.8531", "49 / 50", "1/24.0 of", "0.0123", "3.217", "2.941", "1.634", "6.412"),
        *("2.345", "38.40", "6.60", "1.61 x the teacher's", "activation:\n  bits: 4", "mid.conv  W8A4", "git_commit"),
        *("not recorded", "op13", "13.00", "8/4", "abc123", "feed5eed"),
        *("op12 (fixed input: once)", "8.1%", "0.2600", "outside: attention, norms, embeddings", "25.0%"),
    ):
        assert expected in seen.texts
    assert "seed 7" in seen.texts
    assert len([pair for pair in seen.attributes if pair[1] == "alt" and not pair[2]]) == 0


def test_every_number_is_beside_its_recipe_seed_and_hash(folder):
    """Each section that shows numbers ends with a line that says where they come from."""
    text = report(folder)
    for section in re.findall(r'<section id="(?!made)[^"]+".*?</section>', text, re.DOTALL):
        stamp = section.rpartition('<p class="stamp">')[2]
        for fact in ("w8a4_modiff", "feed5eed", "seed 7", "128 images", "abc123"):
            assert fact in stamp
    page = compared(folder, [("a", result()), ("b", result())])
    assert page.count("<code>feed5eed</code>") + page.count(">feed5eed<") >= 2


def test_samples_have_every_version_and_its_psnr(folder):
    text = report(folder)
    images = re.findall(r'<img src="(data:image/png;base64,[^"]+)"[^>]*\n? alt="([^"]+)"', text)
    assert [alt.split(":")[0] for _, alt in images[:4]] == [
        "Sample 0, teacher",
        "Sample 0, student",
        "Sample 1, teacher",
        "Sample 1, student",
    ]
    expected = float(-10 * (SAMPLES["s"][0] - SAMPLES["t"][0]).double().square().mean().log10())
    assert images[1][1] == f"Sample 0, student: PSNR {expected:.2f} dB"
    assert images[0][0] == data_uri(SAMPLES["t"][0])


def test_every_string_from_outside_is_escaped(folder):
    metrics = copy.deepcopy(METRICS)
    metrics["features"]["network"] = NASTY
    metrics["provenance"] = {NASTY: NASTY, "recipe_hash": NASTY}
    errors = ERRORS | {"operators": [NASTY, "a", "b"]}
    found = result(metrics, errors, [COST[0] | {"name": NASTY}])
    text = report(folder, found, NASTY, NASTY, NASTY)
    assert "<script>alert" not in text
    assert "alert(1)" in Page(text).text
    page = compared(folder, [(NASTY, found)], {NASTY: folder / "x.html"})
    assert "<script>alert" not in page
    assert NASTY in Page(page).texts


@pytest.mark.parametrize(
    ("found", "reasons"),
    [
        (nulls(), ["64 student images are needed, 40 were drawn", "infinite PSNR", "no reference images were given"]),
        (changed(psnr_db=float("nan")), ["it is not a finite number: images hold NaN or Inf"]),
        (changed(psnr_db=None), ["an image identical to the teacher's has an infinite PSNR"]),
    ],
)
def test_a_metric_that_is_null_is_called_not_available_with_its_reason(folder, found, reasons):
    pages = [
        Page(report(folder, found)).text,
        Page(compared(folder, [("a", found)])).text,
        markdown_table([("a", found)]),
    ]
    for text in pages:
        assert "not available" in text
        assert "None" not in text
        for reason in reasons:
            assert reason in text


def test_frechet_distances_are_never_called_fid_and_name_their_network(folder):
    rows = [("a", result())]
    for text in (Page(report(folder)).text, Page(compared(folder, rows)).text, markdown_table(rows)):
        assert "digits-net" in text
        assert "128 images" in text
        assert "fid" not in text.lower()


@pytest.mark.parametrize("name", ["cost.png", "trajectory_errors.png", "samples.safetensors"])
def test_missing_file_is_an_error_and_leaves_the_old_page(folder, name):
    report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"The report needs .*{re.escape(name)}, which does not exist. Draw "):
        report(folder, recipe="another")
    assert (folder / "report.html").read_bytes() == before


def test_page_is_written_whole_or_not_at_all(folder, monkeypatch):
    report(folder)
    before = (folder / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        report(folder, recipe="another")
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_comparison_links_each_recipes_own_report_and_marks_the_best(folder):
    own = folder.parent / "runs" / "a b#1" / "report.html"
    rows = [("w8a4_ptq", changed(psnr_db=13.42)), ("w8a4_modiff", result()), ("x", nulls())]
    text = compared(folder, rows, {"w8a4_modiff": own, "x": folder / "x.html"})
    seen = Page(text)
    links = [address for address in seen.addresses if not address.startswith(("data:image/", "#"))]
    assert links == ["./../runs/a%20b%231/report.html", "./x.html"]
    assert (
        "Closest to the teacher's images is w8a4_modiff (PSNR 40.71 dB), furthest away w8a4_ptq (13.42 dB)" in seen.text
    )
    assert {"full precision", "38.40", "13.42", "40.71", "n/a", "x"} <= set(seen.texts)
    assert re.search(r'<td class="number best" data-value="40.714">40\.71<span class="unseen"> \(best\)</span>', text)
    assert 'best" data-value="13.42"' not in text


def test_comparison_of_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match="no recipes to tabulate; give at least one"):
        compared(folder, [])


def test_embedded_picture_is_the_file_byte_for_byte(folder):
    data = picture(folder / "cost.png").split("base64,")[1]
    assert base64.b64decode(data) == (folder / "cost.png").read_bytes()


def test_small_images_are_embedded_without_loss_and_large_ones_stay_close():
    for size, kind, tolerance in ((32, "png", 0.51), (200, "jpeg", 40.0)):
        ramp = torch.linspace(0, 1, size).expand(3, size, size)
        head, _, data = data_uri(ramp).partition(",")
        assert head == f"data:image/{kind};base64"
        with Image.open(BytesIO(base64.b64decode(data))) as image:
            pixels = np.asarray(image).astype(float)
        assert np.abs(pixels - 255 * ramp.permute(1, 2, 0).numpy()).max() <= tolerance
