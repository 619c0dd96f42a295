# autocompress: set-up, checks and the first run.  `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART ?= results/quickstart
QUICKSTART_BUDGET ?= 100s
PYTEST_ARGS ?=

export PIP_PROGRESS_BAR := off
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := autocompress tests $(wildcard benchmarks)

.PHONY: help install install-test quickstart test lint types contracts format bench-digits bench-fashion bench-budget bench-resume bench-latency bench-export bench-exactness bench-export-cost bench-samplers bench-search clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | column -t -s "$$(printf '\t')"

# Debian splits venv's pip off into a package of its own: as root it is installed, else the command is shown.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' \
	  || { echo "autocompress needs Python 3.11, 3.12 or 3.13; choose one with: make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv; } \
	  || { echo "python3-venv is missing; install it with: sudo apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## make .venv and install autocompress into it

install-test: $(VENV)/.installed-test  ## the same, with what tests and checks need

# --resume starts a run where there is none and goes on with an interrupted one.  A finished one it would give more time,
# so that is asked first.
quickstart: install  ## compress the embedded default (digits, resnet8) and say where the report is
	@if grep -qs '"status": "complete"' $(QUICKSTART)/front.json; then \
	  printf 'Finished already; more time for it: %s search --out %s --resume --time-budget %s\n' \
	    "$(BIN)/autocompress" "$(QUICKSTART)" "$(QUICKSTART_BUDGET)"; \
	else \
	  $(BIN)/autocompress search --task digits --model resnet8 --time-budget $(QUICKSTART_BUDGET) \
	    --out $(QUICKSTART) --resume; \
	fi
	@printf '\nThe report: file://%s/report.html\nIn the terminal: %s show %s\n' \
	  "$(abspath $(QUICKSTART))" "$(BIN)/autocompress" "$(QUICKSTART)"

# Searches are timed, so they run one at a time; what is not timed runs twice at once, with a thread each.
test: install-test lint types contracts  ## lint, types, import contracts, tests
	$(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/contract $(PYTEST_ARGS)

lint: install-test  ## ruff: rules and format
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: install-test  ## mypy, strict
	$(BIN)/mypy

contracts: install-test  ## import-linter: imports point only downwards
	$(BIN)/lint-imports

format: install-test  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench-digits: install  ## three seeds of the embedded default against the bars, about 6 minutes
	$(BIN)/python -m benchmarks.fronts digits

bench-fashion: install  ## ResNet-20 on Fashion-MNIST, 10 minutes (and training the original once)
	$(BIN)/python -m benchmarks.fronts fashion

bench-budget: bench-digits  ## a latency budget, measured again from outside
	$(BIN)/python -m benchmarks.fronts budget

bench-resume: install  ## ten SIGKILLs at random moments, resumed each time
	$(BIN)/python -m benchmarks.kill_resume

bench-latency: install  ## the latency model against plans it has never seen, at one and two threads, about 25 minutes
	$(BIN)/python -m benchmarks.latency

bench-export-cost: install  ## what reading a model and writing a plan's file take, about a minute
	$(BIN)/python -m benchmarks.export_cost

bench-export: install  ## int8 exports of eight networks against onnxruntime's own quantizer, about 40 minutes
	$(PIP) install --quiet -c constraints.txt -e '.[transformers]'
	$(BIN)/python -m benchmarks.export

bench-samplers: install  ## samplers at equal evaluations, and repair under a tight budget, about 25 minutes
	$(BIN)/python -m benchmarks.samplers --fresh

bench-exactness: install  ## simulation against file on 10,000 images (and training the originals once)
	$(BIN)/python -m benchmarks.exactness

bench-search: install  ## the search against simpler ways at equal time, ten minutes a cell; goes on where it stopped
	$(PIP) install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.search

clean:  ## remove the environment, caches and the quickstart's results
	rm -rf $(VENV) $(QUICKSTART) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
