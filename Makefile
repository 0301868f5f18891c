# Needs nothing but Python, pip and make. PYTHON picks the interpreter that builds .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.docs-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo lint test docs wheel-test clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## build .venv, once for each change of the dependencies

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## prune the built-in model and show what it cost (minutes, offline)
	$(BIN)/moe-compress demo demo-out --force

lint: $(STAMP)  ## formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint  ## lint, then the whole suite
	$(BIN)/python -m pytest -n 2

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(DOCS_STAMP)  ## build the documentation into build/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel-test:  ## build the wheel, install it into an empty environment, use it there
	$(PYTHON) tests/check_wheel.py

clean:  ## remove the demo's result, caches and builds; .venv stays
	rm -rf demo-out demo-out.work build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
