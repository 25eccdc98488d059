PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLEAN := $(or $(TMPDIR),/tmp)/genalign-wheel

.PHONY: demo demo-audio test test-slow test-gpu check wheel proofs format docs docs-results

demo: $(INSTALLED)
	$(BIN)/genalign demo

demo-audio: $(INSTALLED)
	$(BIN)/genalign demo tones

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 --numprocesses=logical --maxprocesses=8 --dist=worksteal # a core each

# Two files at once: their tests share fixtures, and some start processes of their own; in this order the soak is not last
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow --durations=10 --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-gpu: $(INSTALLED) # with GENALIGN_TEST_DEVICE=cpu on the CPU
	$(BIN)/python -m pytest -q -m gpu -rs --durations=10 tests/gpu

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python scripts/benchmarks/results_tables.py --check
	$(BIN)/python -m scripts.settings_reference --check

wheel: $(INSTALLED) # build it, install it into a clean environment, and use it from another directory
	rm -rf build dist $(CLEAN)
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv $(CLEAN)/venv
	$(CLEAN)/venv/bin/pip install -q -c constraints.txt dist/*.whl
	cd $(CLEAN) && venv/bin/python $(CURDIR)/tests/smoke/wheel.py
	rm -rf $(CLEAN)

proofs: $(INSTALLED)
	$(BIN)/python scripts/benchmarks/proofs.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # the theme's notice of its successor is no warning of ours

docs-results: $(INSTALLED)
	$(BIN)/python scripts/benchmarks/results_tables.py

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@
