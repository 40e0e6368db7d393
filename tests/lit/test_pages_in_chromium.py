"""The pages in a headless Chromium: no error on the console; sorting, zooming, flipping, charts and themes work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from modiff.lit.report.pages import write_compare_report, write_report
from tests.lit.browsers import browser, obstacle
from tests.lit.results import changed, nulls, result

REASON = obstacle()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in ("trajectory_errors", "cost", "compare"):
        Image.new("L", (40, 30)).save(folder / f"{name}.png")
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.rand(2, 4, 1, 8, 8, generator=generator)
    save_file({"teacher": teacher, "student": student}, folder / "samples.safetensors")
    write_report(folder, recipe="w8a4_modiff", result=result(), config_yaml="seed: 0", description="conv_in")
    (folder / "compare").mkdir()
    Image.new("L", (40, 30)).save(folder / "compare" / "compare.png")
    rows = [("ptq", changed(psnr_db=13.42)), ("modiff", result()), ("none", nulls())]
    versions = {"full precision": teacher, "ptq": student, "modiff": teacher, "none": teacher}
    write_compare_report(folder / "compare", rows, versions)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def evaluated(chromium, folder):
    chromium.get((folder / "report.html").as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


@pytest.fixture
def compared(chromium, folder):
    chromium.get((folder / "compare" / "report.html").as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def run(driver, script, *args):
    return driver.execute_script(script, *args)


def press(driver, selector, *keys):
    for key in keys:
        run(
            driver,
            "document.querySelector(arguments[0]).dispatchEvent("
            "new KeyboardEvent('keydown', {key: arguments[1], bubbles: true, cancelable: true}))",
            selector,
            key,
        )


def column(driver, table, index):
    rows = "[...document.querySelectorAll(arguments[0] + ' tbody tr')]"
    return run(driver, f"return {rows}.map((row) => row.cells[arguments[1]].textContent.trim())", table, index)


def test_a_click_on_a_heading_sorts_by_value_and_another_turns_the_order(compared):
    table, click = "#recipes table", "document.querySelectorAll('#recipes thead .sort')[1].click()"
    first = column(compared, table, 0)
    assert first == ["full precision", "ptq", "modiff", "none"]
    run(compared, click)
    assert column(compared, table, 0)[:2] == ["modiff", "ptq"]  # 40.71 before 13.42; those without PSNR stay last
    run(compared, click)
    assert column(compared, table, 0)[:2] == ["ptq", "modiff"]
    state = "return document.querySelectorAll('#recipes thead th')[1].getAttribute('aria-sort')"
    assert run(compared, state) == "ascending"
    assert "ascending" in run(compared, "return document.getElementById('announcements').textContent")
    run(compared, "document.querySelectorAll('#recipes thead .sort')[0].click()")
    assert column(compared, table, 0) == sorted(first)


def shown(driver, selector=".sample"):
    script = "return [...document.querySelector(arguments[0]).querySelectorAll('img.shown')].map((i) => i.alt)"
    return [alt.split(":")[0].split(", ")[1] for alt in run(driver, script, selector)]


def test_samples_flip_between_teacher_and_student_by_button_and_key(evaluated):
    assert shown(evaluated) == ["student"]
    run(evaluated, "document.querySelector('.gallery .flip').click()")
    assert shown(evaluated) == ["teacher"]
    press(evaluated, ".gallery .sample", "f")
    assert shown(evaluated) == ["student"]
    run(evaluated, "document.querySelector('.gallery [data-name=difference]').click()")
    assert shown(evaluated) == ["teacher", "student"]
    blend = "return getComputedStyle(document.querySelectorAll('.sample img.shown')[1]).mixBlendMode"
    assert run(evaluated, blend) == "difference"


def test_a_sample_opens_larger_zooms_flips_and_gives_the_focus_back(evaluated):
    run(evaluated, "document.querySelectorAll('.sample')[1].click()")
    width = "return document.querySelector('.viewer .stage').getBoundingClientRect().width"
    heading = "return document.querySelector('.viewer h2').textContent"
    assert run(evaluated, "return document.querySelector('.viewer').open")
    assert run(evaluated, heading) == "Sample 1"
    fitted = run(evaluated, width)
    assert fitted > 8 * 8  # 8 pixels, fitted into the window
    press(evaluated, ".viewer", "-")
    assert run(evaluated, width) == pytest.approx(fitted / 2)
    press(evaluated, ".viewer", "+", "+")
    assert run(evaluated, width) == pytest.approx(2 * fitted)
    press(evaluated, ".viewer", "0")
    assert run(evaluated, width) == pytest.approx(fitted)
    before = shown(evaluated, ".viewer .stage")
    press(evaluated, ".viewer", "f")
    assert sorted(before + shown(evaluated, ".viewer .stage")) == ["student", "teacher"]
    press(evaluated, ".viewer", "ArrowRight")
    assert run(evaluated, heading) == "Sample 2"
    run(evaluated, "document.querySelector('.viewer').close()")
    focus = "return [...document.querySelectorAll('.sample')].indexOf(document.activeElement)"
    evaluated.execute_async_script("setTimeout(arguments[0], 50)")
    assert run(evaluated, focus) == 2


def test_curves_are_read_by_keys_and_switched_off_and_the_heat_map_adds_one(evaluated):
    lines = "return [...document.querySelectorAll('.curves .line')].map((line) => line.dataset.name)"
    assert run(evaluated, lines) == ["x_t", "median operator", "worst operator"]
    press(evaluated, ".curves .area", "ArrowRight", "ArrowRight")
    readout = "return document.querySelector('{} .readout').textContent"
    assert "t = 600: x_t 1.1 %" in run(evaluated, readout.format(".curves"))
    press(evaluated, ".heatmap .heat", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight")
    assert run(evaluated, readout.format(".heatmap")) == "mid.conv, t = 300: 40 %"
    press(evaluated, ".heatmap .heat", "Enter")
    assert run(evaluated, lines)[-1] == "mid.conv"
    run(evaluated, "document.querySelector('.curves .legend button').click()")
    assert run(evaluated, lines) == ["median operator", "worst operator", "mid.conv"]


def test_heat_map_is_filtered_and_ordered(evaluated):
    change = "const node = document.querySelector(arguments[0]); node.value = arguments[1];"
    change += "node.dispatchEvent(new Event(arguments[2]))"
    run(evaluated, change, ".heatmap select", "error", "change")
    press(evaluated, ".heatmap .heat", "ArrowRight")
    assert run(evaluated, "return document.querySelector('.heatmap .readout').textContent").startswith("mid.conv")
    run(evaluated, change, ".heatmap input", "conv_", "input")
    assert "2 operators" in run(evaluated, "return document.querySelector('.heatmap .readout').textContent")


def test_points_of_the_comparison_follow_the_axes(compared):
    names = "return [...document.querySelectorAll('.scatter g')].map((g) => g.getAttribute('aria-label'))"
    assert [name.split(":")[0] for name in run(compared, names)] == ["ptq", "modiff"]  # those with a PSNR
    script = "const select = document.querySelectorAll('.scatter select')[1];"
    script += "select.value = '3'; select.dispatchEvent(new Event('change'))"
    run(compared, script)
    assert [name.split(":")[0] for name in run(compared, names)] == ["ptq", "modiff", "none"]


def contrast(one, other):
    def luminance(color):
        parts = np.array([int(part) / 255 for part in color[4:-1].split(",")[:3]])
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_stand_out_from_their_background(evaluated, theme):
    run(evaluated, "document.documentElement.dataset.theme = arguments[0]", theme)
    color = "return getComputedStyle(document.querySelector(arguments[0])).{}"
    card = run(evaluated, color.format("backgroundColor"), "section")
    for selector in ("section p", ".soft", ".tile b", ".stamp", "thead th", "a"):
        assert contrast(run(evaluated, color.format("color"), selector), card) >= 4.5, (theme, selector)
    dark = run(evaluated, color.format("colorScheme"), ":root") == "dark"
    assert dark == (theme == "dark")


@pytest.mark.parametrize("page", ["report.html", "compare/report.html"])
def test_everything_that_can_be_reached_has_a_name(chromium, folder, page):
    chromium.get((folder / page).as_uri())
    kinds = "[...document.querySelectorAll('button, select, input, [tabindex], img, a')]"
    named = "node.getAttribute('aria-label') || node.alt || node.textContent.trim() || node.id"
    assert run(chromium, f"return {kinds}.length") > 20
    assert run(chromium, f"return {kinds}.filter((node) => !({named})).map((node) => node.outerHTML)") == []


def test_theme_button_goes_through_system_light_and_dark(evaluated):
    texts = []
    for _ in range(4):
        texts.append(run(evaluated, "return document.getElementById('theme').textContent"))
        run(evaluated, "document.getElementById('theme').click()")
    assert texts == ["Theme: system", "Theme: light", "Theme: dark", "Theme: system"]


def test_print_shows_every_row_without_the_tools(evaluated):
    evaluated.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        assert run(evaluated, style, ".bar", "display") == "none"
        assert run(evaluated, style, ".tall", "maxHeight") == "none"
    finally:
        evaluated.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
