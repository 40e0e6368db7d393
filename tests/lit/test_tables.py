"""Tables of results in the terminal and in Markdown."""

from io import StringIO

import pytest
from rich.console import Console

from modiff.errors import ConfigError
from modiff.lit.report.tables import markdown_table, metrics_table, result_table
from tests.lit.results import changed, nulls, result


def rendered(table, width):
    text = StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def test_terminal_table_keeps_every_number_at_80_columns():
    rows = [("w8a4_ptq", changed(psnr_db=13.42)), ("w8a4_modiff_no_compensation", result()), ("[red]", nulls())]
    lines = rendered(metrics_table(rows), 80).splitlines()
    cells = [line.split() for line in lines]
    assert ["full", "precision", "–", "–", "2.941", "–", "38.40", "6.412", "0", "1.00", "0/50"] in cells
    assert ["w8a4_ptq", "13.42", "0.8531", "3.217", "0.0123", "1.600", "1.634", "2.345", "1.61", "49/50"] in cells
    assert ["[red]", "n/a", "n/a", "n/a", "0", "1.600", "1.634", "2.345", "1.61", "49/50"] in cells
    assert max(map(len, lines)) <= 80
    assert "w8a4_modiff_no_compensation" in rendered(metrics_table(rows), 120)


def test_markdown_table_holds_the_numbers_and_escapes_names():
    lines = markdown_table([("a|b", result()), ("<i>", nulls())]).splitlines()
    assert lines[2] == "| full precision | – | – | 2.941 | – | 38.40 | 6.412 | 0 | 1.00 | 0/50 |"
    assert lines[3] == "| a\\|b | 40.71 | 0.8531 | 3.217 | 0.0123 | 1.600 | 1.634 | 2.345 | 1.61 | 49/50 |"
    assert lines[4] == "| \\<i> | n/a | n/a | n/a | 0 | 1.600 | 1.634 | 2.345 | 1.61 | 49/50 |"
    assert len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    below = "\n".join(lines[5:])
    assert "PSNR to the teacher's images not available (\\<i>): an image identical to the teacher's" in below
    assert "Fréchet distance to real images not available (full precision): no reference images were given" in below


@pytest.mark.parametrize("make", [metrics_table, markdown_table])
def test_table_without_recipes_is_refused(make):
    with pytest.raises(ConfigError, match="no recipes to tabulate; give at least one"):
        make([])


def test_table_of_one_result_names_every_figure_it_has():
    text = rendered(result_table("[mine]", changed(psnr_db=13.42)), 100)
    for expected in ("[mine]", "PSNR to the teacher's images, dB", "13.42", "3.217", "2.941", "GBOPs per evaluation"):
        assert expected in text
    assert "LPIPS" not in text
    assert "PSNR" not in rendered(result_table("x", nulls()), 100)
