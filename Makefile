# `make demo` and `make test` need Python >= 3.11 and make, nothing else.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHECKED := $(wildcard probgen tests benchmarks examples docs/hooks conftest.py)
# Two test processes on two cores: one thread each, or they wait for one another.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-all lint format benchmark clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */\1: /p' Makefile

setup: $(STAMP)  ## create .venv with everything pinned by constraints.txt

# `make PYTHON=/path/to/python` chooses the interpreter; otherwise the first that is new enough is taken.
$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Setting up $(VENV) with $$($$python --version) ..."; \
	    $$python -m venv $(VENV) && exit 0; \
	    echo "$$python cannot create a virtual environment; on Debian install python3-venv." >&2; exit 1; \
	  fi; \
	done; \
	echo "probgen needs Python >= 3.11 and none was found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test]'
	@touch $@

demo: setup  ## real digits, five programs, engine after engine; ends with runs/demo/report.html
	$(BIN)/probgen demo

docs: setup  ## the documentation, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open build/docs/index.html"

test: lint  ## what every change must pass
	$(PYTEST)

test-all: lint  ## the slow tests too
	$(PYTEST) -m "slow or not slow"

lint: setup  ## style, format and types
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: setup  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

benchmark: setup  ## ours against hand-written loops, bare networks and other solvers
	$(ONE_THREAD) $(BIN)/python -m benchmarks.training
	$(ONE_THREAD) $(BIN)/python -m benchmarks.sampling
	$(ONE_THREAD) $(BIN)/python -m benchmarks.likelihood
	$(ONE_THREAD) $(BIN)/python -m benchmarks.solvers
	$(ONE_THREAD) $(BIN)/python -m benchmarks.mcmc
	$(ONE_THREAD) $(BIN)/python -m benchmarks.energies
	$(ONE_THREAD) $(BIN)/python -m benchmarks.calibration --quick

clean:  ## remove everything these targets made
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
	find probgen tests -name __pycache__ -type d -prune -exec rm -rf {} +
