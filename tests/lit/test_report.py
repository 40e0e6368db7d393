import base64
import copy
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console

from modiff.errors import ConfigError
from modiff.lit.report import page
from modiff.lit.report.image_grids import image_grid, save_picture
from modiff.lit.report.pages import markdown_table, metrics_table, write_compare_report, write_report
from modiff.lit.report.sentences import describe_errors, headline, worst_operators

VOID = {"meta", "img", "link", "br", "hr", "input"}
NASTY = "<script>alert(1)</script>\"'&"
METRICS = {
    "teacher": {"fid": 2.941},
    "student": {"fid": 3.217, "fid_to_teacher": 0.8531, "psnr_db": 40.714, "relative_l2": 0.01234},
    "features": {"network": "digits-net", "num_features": 32, "num_images": 128},
    "cost": {
        "gbops_per_evaluation": 1.6,
        "other_gbops_per_evaluation": 0.4,
        "other_weight_mib": 0.007,
        "teacher_gbops_per_evaluation": 38.4,
        "weight_mib": 1.634,
        "teacher_weight_mib": 6.412,
        "state_mib_per_image": 2.345,
    },
    "evaluations": {"total": 50, "quantized": 49},
    "num_images": 128,
    "seconds": 81.3,
    "seconds_per_image_evaluation": {"teacher": 0.0041, "student": 0.0066},
    "time_ratio": 1.61,
    "seed": 7,
    "provenance": {"git_commit": "abc123", "gpu": None},
}
ERRORS = {
    "timesteps": [900, 600, 300],
    "operators": ["conv_in", "mid.conv", "conv_out"],
    "operator_error": [[None, 0.01, 0.03], [None, 0.2, 0.4], [0.0, 0.05, 0.07]],
    "sample_error": [0.0, 0.011, 0.0123],
}
COST = [
    {
        "name": f"op{i}",
        "macs": 1e6 * i,
        "weight_bits": 8,
        "activation_bits": 4,
        "gbops": 0.01 * i,
        "state_mib": 0.1,
        "constant": i == 12,
        "weight_mib": 0.02 * i,
    }
    for i in range(14)
]


def changed(**student):
    metrics = copy.deepcopy(METRICS)
    metrics["student"] |= student
    return metrics


def nulls(images=40):
    metrics = changed(fid=None, fid_to_teacher=None, psnr_db=None, relative_l2=0.0)
    metrics["teacher"]["fid"] = None
    metrics["features"]["num_images"] = images
    return metrics


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("samples", "trajectory_errors", "cost", "compare")):
        Image.new("L", (3 + i, 2)).save(tmp_path / f"{name}.png")
    return tmp_path


def report(folder, **changes):
    given = {
        "recipe": "w8a4_modiff",
        "metrics": METRICS,
        "errors": ERRORS,
        "cost_rows": COST,
        "config_yaml": "preset: null",
        "description": "conv_in  Conv2d",
    }
    path = write_report(folder, **(given | changes))
    return path.read_text(encoding="utf-8")


def test_report_is_one_page_that_asks_nobody_for_anything(folder):
    text = report(folder)
    seen = Page(text)
    assert seen.tags.count("img") == 3
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)
    assert len(set(seen.addresses)) == 3
    assert "script" not in seen.tags
    assert "link" not in seen.tags
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text


def test_report_shows_the_given_numbers_and_texts(folder):
    seen = Page(report(folder, config_yaml="activation:\n  bits: 4", description="mid.conv  W8A4"))
    for expected in (
        *("w8a4_modiff", "40.71 dB", "0.8531", "49 / 50", "1/24.0 of", "0.01234", "3.217", "2.941", "1.634", "6.412"),
        *("2.345", "38.40", "6.60 ms (1.61 x)", "activation:\n  bits: 4", "mid.conv  W8A4", "git_commit", "abc123"),
        *("not recorded", "op13", "13.00", "8/4", "The other 4 operators"),
        *("op12 (fixed input: once)", "8.1%", "0.2600", "outside: attention, norms, embeddings", "25.0%"),
    ):
        assert expected in seen.texts
    assert "seed 7" in seen.text
    assert "not available" not in seen.text
    assert seen.tags.count("details") == 4


def test_every_string_from_outside_is_escaped(folder):
    metrics = copy.deepcopy(METRICS)
    metrics["features"]["network"] = NASTY
    metrics["provenance"] = {NASTY: NASTY}
    errors = ERRORS | {"operators": [NASTY, "a", "b"]}
    cost = [COST[0] | {"name": NASTY}]
    given = {"recipe": NASTY, "metrics": metrics, "errors": errors, "cost_rows": cost}
    text = report(folder, **given, config_yaml=NASTY, description=NASTY)
    assert "<script" not in text
    # title, heading, tile, note on features, worst operator, cost row, configuration, description, provenance twice
    assert Page(text).text.count(NASTY) == 10


@pytest.mark.parametrize(
    ("metrics", "reasons"),
    [
        (nulls(), ["at least 64 images (twice the 32 features of digits-net), not 40", "PSNR is infinite"]),
        (nulls(images=64), ["no statistics of real images under digits-net were given", "it was not computed"]),
        (changed(psnr_db=None), ["an image identical to the teacher's has an infinite PSNR"]),
    ],
)
def test_a_metric_that_is_null_is_called_not_available_with_its_reason(folder, metrics, reasons):
    text = Page(report(folder, metrics=metrics)).text
    compared = write_compare_report(folder, [("a", metrics)], folder / "samples.png")
    table = Page(compared.read_text(encoding="utf-8")).text
    for reason in reasons:
        assert reason in text
        assert reason in table
        assert reason in markdown_table([("a", metrics)])
    assert "not available" in text
    assert "not available" in table
    assert "None" not in text + table


def test_frechet_distances_are_never_called_fid_and_name_their_network(folder):
    rows = [("a", METRICS)]
    texts = [report(folder), markdown_table(rows)]
    texts.append(write_compare_report(folder, rows, folder / "samples.png").read_text(encoding="utf-8"))
    for text in texts:
        assert "digits-net" in text
        assert "128 images" in text
        visible = Page(text).text
        assert "FID" not in visible
        assert "fid" not in visible.lower()


def test_missing_picture_is_an_error_and_leaves_the_old_page(folder):
    report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "cost.png").unlink()
    with pytest.raises(ConfigError, match=r"needs .*cost\.png, which does not exist. Draw it"):
        report(folder, recipe="another")
    assert (folder / "report.html").read_bytes() == before


def test_page_is_written_whole_or_not_at_all(folder, monkeypatch):
    report(folder)
    before = (folder / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modiff.storage.atomic.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        report(folder, recipe="another")
    assert (folder / "report.html").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("psnr", "expected"),
    [(40.0, "hard to tell"), (39.9, "close to"), (25.0, "recognizably"), (12.0, "far from"), (-3.0, "far from")],
)
def test_headline_says_what_the_psnr_means(psnr, expected):
    assert expected in headline(changed(psnr_db=psnr))


def test_headline_counts_evaluations_and_bit_operations():
    metrics = copy.deepcopy(METRICS)
    assert "49 of 50 denoiser evaluations" in headline(metrics)
    assert "takes 1/24.0 of the teacher's bit operations" in headline(metrics)
    metrics["evaluations"]["quantized"] = 50
    assert "all 50 denoiser evaluations ran on quantized activations" in headline(metrics)
    metrics["evaluations"]["quantized"] = 0
    metrics["cost"]["gbops_per_evaluation"] = 76.8
    assert "none of the 50 denoiser evaluations quantized" in headline(metrics)
    assert "takes 2.00 times the teacher's bit operations" in headline(metrics)
    assert "identical to the teacher's" in headline(nulls())


def test_errors_in_words_name_the_worst_operators_and_steps():
    assert worst_operators(ERRORS, 2) == [("mid.conv", pytest.approx(0.3)), ("conv_out", pytest.approx(0.04))]
    path, operators, steps = (text.replace("\N{NO-BREAK SPACE}", " ") for text in describe_errors(ERRORS))
    assert "0 % away from the teacher's at the first evaluation (t = 900) and 1.23 % at the last (t = 300)" in path
    assert "mid.conv (30.0 %), conv_out (4.00 %), conv_in (2.00 %)" in operators
    assert "t = 300 (7.00 %), t = 600 (5.00 %)" in steps


def test_no_error_anywhere_is_said_so():
    clean = ERRORS | {"operator_error": [[None, 0.0, 0.0]] * 3, "sample_error": [0.0] * 3}
    assert describe_errors(clean)[-1] == "No operator's output differed from the teacher's."


def test_errors_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match="3 timesteps, 2 operators, 3 sample errors and 3 rows"):
        describe_errors(ERRORS | {"operators": ["a", "b"]})


def rendered(rows, width):
    text = StringIO()
    Console(file=text, width=width).print(metrics_table(rows))
    return text.getvalue()


def test_terminal_table_keeps_every_number_at_80_columns():
    rows = [("w8a4_ptq", changed(psnr_db=13.42)), ("w8a4_modiff_no_compensation", METRICS), ("[red]", nulls())]
    lines = rendered(rows, 80).splitlines()
    cells = [line.split() for line in lines]
    assert ["full", "precision", "–", "–", "2.941", "–", "38.40", "6.412", "0", "1.00", "0/50"] in cells
    assert ["w8a4_ptq", "13.42", "0.8531", "3.217", "0.0123", "1.600", "1.634", "2.345", "1.61", "49/50"] in cells
    assert ["[red]", "n/a", "n/a", "n/a", "0", "1.600", "1.634", "2.345", "1.61", "49/50"] in cells
    assert max(map(len, lines)) <= 80
    assert "w8a4_modiff_no_compensation" in rendered(rows, 120)


def test_markdown_table_holds_the_numbers_and_escapes_names():
    lines = markdown_table([("a|b", METRICS), ("<i>", nulls())]).splitlines()
    assert lines[2] == "| full precision | – | – | 2.941 | – | 38.40 | 6.412 | 0 | 1.00 | 0/50 |"
    assert lines[3] == "| a\\|b | 40.71 | 0.8531 | 3.217 | 0.0123 | 1.600 | 1.634 | 2.345 | 1.61 | 49/50 |"
    assert lines[4] == "| \\<i> | n/a | n/a | n/a | 0 | 1.600 | 1.634 | 2.345 | 1.61 | 49/50 |"
    assert len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    assert "PSNR not available (\\<i>): the student's images are identical" in "\n".join(lines[5:])


@pytest.mark.parametrize("make", [metrics_table, markdown_table])
def test_table_without_recipes_is_refused(make):
    with pytest.raises(ConfigError, match="no recipes to tabulate; give at least one"):
        make([])


def test_comparison_links_each_recipes_own_report_and_embeds_the_rest(folder):
    own = folder.parent / "runs" / "a b#1" / "report.html"
    rows = [("w8a4_ptq", changed(psnr_db=13.42)), ("w8a4_modiff", METRICS), (NASTY, nulls())]
    path = write_compare_report(folder, rows, folder / "samples.png", {"w8a4_modiff": own, NASTY: folder / "x.html"})
    text = path.read_text(encoding="utf-8")
    seen = Page(text)
    assert "<script" not in text
    links = [address for address in seen.addresses if not address.startswith("data:image/png;base64,")]
    assert links == ["./../runs/a%20b%231/report.html", "./x.html"]
    assert seen.tags.count("img") == 2
    assert (
        "Closest to the teacher's images is w8a4_modiff (PSNR 40.71 dB), furthest away w8a4_ptq (13.42 dB)" in seen.text
    )
    assert {"full precision", "38.40", "13.42", "40.71", "not available", NASTY} <= set(seen.texts)


def test_embedded_picture_is_the_file_byte_for_byte(tmp_path):
    save_picture(image_grid(torch.rand(4, 1, 8, 8), 2), tmp_path / "p.png")
    html = page.picture(tmp_path / "p.png", 'a "b" <c>')
    data = html.split("base64,")[1].split('"')[0]
    assert base64.b64decode(data) == (tmp_path / "p.png").read_bytes()
    assert 'alt="a &quot;b&quot; &lt;c&gt;"' in html
