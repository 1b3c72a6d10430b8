# Everything runs in $(VENV), which is made on first use and again when pyproject.toml or constraints.txt change.
# Needs only python3 (3.11 or newer, with venv) and make. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Test processes; each uses $(TEST_THREADS) threads, so that a result does not depend on how busy the machine is.
TEST_WORKERS ?= 2
TEST_THREADS ?= 1
PYTEST_ARGS ?=
# UV=1 makes the environment with `uv`, which must be installed, in place of `python -m venv` and pip.
UV ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow coverage check format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the development environment

$(STAMP): pyproject.toml constraints.txt setup.py
ifeq ($(UV),1)
	test -x $(PY) || uv venv --python $(PYTHON) $(VENV)
	uv pip install --python $(PY) -c constraints.txt -e '.[dev]'
else
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing the development environment: a few minutes the first time"
	$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
endif
	touch $@

demo: $(STAMP) ## train a transformer on real text in less memory, and show that nothing else changed
	$(PY) -m recipes.demo

test: $(STAMP) ## run the tests, slow ones left out
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -n $(TEST_WORKERS) -m "not slow" $(PYTEST_ARGS)

coverage: $(STAMP) ## run the same tests with a coverage report, which takes nearly twice as long
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -n $(TEST_WORKERS) -m "not slow" \
		--cov --cov-report=term $(PYTEST_ARGS)

test-slow: $(STAMP) ## run the slow tests
	OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest -n $(TEST_WORKERS) -m slow $(PYTEST_ARGS)

check: $(STAMP) ## lint, format, types, import contracts, documentation
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports --no-logo
	$(PY) -m mkdocs build --strict --quiet --site-dir build/site

format: $(STAMP) ## rewrite the sources in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(STAMP) ## build the documentation into build/site
	$(PY) -m mkdocs build --strict --site-dir build/site

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage htmlcov
