import doctest
import importlib

import pytest

WITH_EXAMPLES = ["modiff.config", "modiff.cost", "modiff.quantizers.granularity"]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": importlib.import_module("torch")})
    assert result.attempted > 0
    assert result.failed == 0
