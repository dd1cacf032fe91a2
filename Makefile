# On a machine that has Python 3.11 or newer and make, `make demo` and `make test` need nothing before them.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 4
ARGS ?=

BIN := $(VENV)/bin
OLDEST := .venvs/oldest
INSTALL := $(BIN)/python -m pip install --quiet --editable
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test cover test-short test-others test-oldest test-all proof bench fuzz mutants lint format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  ARGS=…      handed to taskguard demo or pytest: make demo ARGS=--stock, make test ARGS='-k chord'"
	@echo "  PYTHON=…    the interpreter of a new environment (python3); VENV=… its directory (.venv)"
	@echo "  JOBS=…      how many test processes (4: tests wait more than they work, and PostgreSQL has 100 connections)"

demo: $(VENV)/.demo ## crash real workers over 500 orders and count what was lost
	$(BIN)/taskguard demo $(ARGS)

test: $(VENV)/.test ## the whole test suite
	$(PYTEST) $(ARGS)

cover: $(VENV)/.test ## the whole suite with branch coverage, workers and their children included; twice as long
	$(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

test-short: $(VENV)/.test ## unit tests, the contracts of memory and Redis, and the integration tests marked smoke
	$(PYTEST) tests/unit tests/workers $(ARGS)
	$(PYTEST) tests/contracts -k 'memory or redis' $(ARGS)
	$(PYTEST) tests/integration tests/proof -m smoke $(ARGS)

test-others: $(VENV)/.test ## test-short on every other Python from 3.11 on that this machine has
	@set -e; pythons=$$(scripts/pythons); \
	minor='import sys; print("%d.%d" % sys.version_info[:2])'; \
	first=$$($(BIN)/python -c "$$minor"); \
	for python in $$pythons; do \
		version=$$($$python -c "$$minor"); \
		test "$$version" != "$$first" || continue; \
		echo "== Python $$version"; \
		$(MAKE) --no-print-directory test-short VENV=.venvs/$$version PYTHON=$$python; \
	done

test-oldest: $(OLDEST)/.oldest ## unit and smoke tests on the oldest Celery that taskguard supports
	$(OLDEST)/bin/python -m pytest -n $(JOBS) tests/unit tests/integration/test_eager.py $(ARGS)
	$(OLDEST)/bin/python -m pytest -n $(JOBS) tests/integration tests/proof -m smoke $(ARGS)

test-all: test test-others test-oldest ## the suite on every Python: whole on the first, short on the others

proof: $(VENV)/.test ## every hazard, crash point and kill beside stock Celery; an hour or two
	$(BIN)/python -m tests.proof $(ARGS)
	$(if $(ARGS),,PROOF_ALL=1 $(PYTEST) tests/integration)

bench: $(VENV)/.bench ## the tables of figures: throughput, memory, idle CPU, bytes in Redis, calls to downstreams
	$(BIN)/python -m tests.benchmarks $(ARGS)

fuzz: $(VENV)/.test ## coverage-guided fuzzing of what arrives: make fuzz ARGS='wire 600' (wire, line, message; seconds)
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(VENV)/.test ## a small mistake at a time in the gate, the life of a message and the record store
	$(if $(filter command line,$(origin JOBS)),JOBS=$(JOBS)) $(BIN)/python -m tests.mutation $(ARGS)

lint: $(VENV)/.lint ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.lint ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove all that make has made, the environments included
	rm -rf $(VENV) .venvs build dist htmlcov .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pip that comes with a Python may be too old to know dependency groups.
$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "taskguard needs Python 3.11 or newer; $(PYTHON) is not: name one with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.pip
	$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.pip
	$(INSTALL) '.[all]' --group test
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.pip
	$(INSTALL) '.[all]' --group bench
	@touch $@

$(OLDEST)/.oldest: pyproject.toml
	$(MAKE) --no-print-directory $(OLDEST)/.test VENV=$(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet 'celery==5.5.3'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.pip
	$(INSTALL) '.[all]' --group dev
	@touch $@
