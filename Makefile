PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check proofs format docs-results

demo: $(INSTALLED)
	$(BIN)/genalign demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow --durations=10

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python scripts/results_tables.py --check

proofs: $(INSTALLED)
	$(BIN)/python scripts/proofs.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs-results: $(INSTALLED)
	$(BIN)/python scripts/results_tables.py

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
