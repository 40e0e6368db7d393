"""What a result says in words."""

import pytest

from modiff.errors import ConfigError
from modiff.lit.report.sentences import describe_errors, headline, worst_operators
from tests.lit.results import ERRORS, changed, nulls, result


@pytest.mark.parametrize(
    ("psnr", "expected"),
    [(40.0, "hard to tell"), (39.9, "close to"), (25.0, "recognizably"), (12.0, "far from"), (-3.0, "far from")],
)
def test_headline_says_what_the_psnr_means(psnr, expected):
    assert expected in headline(changed(psnr_db=psnr))


def test_headline_counts_evaluations_and_bit_operations():
    found = result()
    assert "49 of 50 denoiser evaluations" in headline(found)
    assert "takes 1/24.0 of the teacher's bit operations" in headline(found)
    found.evaluations["quantized"] = 50
    assert "all 50 denoiser evaluations ran on quantized activations" in headline(found)
    found.evaluations["quantized"] = 0
    found.cost["gbops_per_evaluation"] = 76.8
    assert "none of the 50 denoiser evaluations quantized" in headline(found)
    assert "takes 2.00 times the teacher's bit operations" in headline(found)
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
