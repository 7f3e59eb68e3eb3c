# Every target sets up .venv by itself when needed; run `make compare` or `make test` on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install compare bench train test catalogue results-table lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lvsoftmax needs Python >= 3.11, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

install: $(READY)  ## make .venv and install the exact versions of constraints.txt

compare: $(READY)  ## the main job: train every family of output layer and write the report (ARGS='study=...')
	$(BIN)/python -m experiments.compare $(ARGS)

bench: $(READY)  ## measure speed and memory of every layer beside what else is installed (ARGS='study=...')
	$(BIN)/python -m experiments.benchmark $(ARGS)

train: $(READY)  ## train one model (ARGS='output=sampled_softmax data=sotu seed=2')
	$(BIN)/python -m experiments.train $(ARGS)

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto -q $(ARGS)

catalogue: $(READY)  ## write the README's table of output layers from their docstrings
	$(BIN)/python -m experiments.catalogue

results-table: $(READY)  ## write the README's results, their figures and the report from experiments/results
	$(BIN)/python -m experiments.showcase

lint: $(READY)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches, never results
	rm -rf .venv .cache .pytest_cache .ruff_cache *.egg-info
