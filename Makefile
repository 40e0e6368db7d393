# make demo: the main job.  make test: the tests.  Both install what they need into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := w8a4_ptq w8a4_modiff w8a4_modiff_no_compensation

.PHONY: help install demo test lint recipes clean

help:
	@echo "make demo     compare 4-bit activations with and without modulation on the packaged teacher"
	@echo "make test     run the tests"
	@echo "make lint     ruff, mypy, import-linter"
	@echo "make recipes  check that every recipe parses and builds"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/modiff compare $(DEMO:%=recipes/mnist/%.yaml) --output runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

recipes: $(STAMP)
	$(BIN)/python -m pytest tests/recipes

clean:
	rm -rf $(VENV) runs
