import doctest
import importlib

import pytest

WITH_EXAMPLES = [
    "modiff.config.quant",
    "modiff.config.rules",
    "modiff.config.specs",
    "modiff.kernels.accumulate",
    "modiff.kernels.compiled",
    "modiff.quantizers.granularity",
    "modiff.quantizers.held",
    "modiff.student.cost",
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": importlib.import_module("torch")})
    assert result.attempted > 0
    assert result.failed == 0
