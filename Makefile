# Everything here works from a bare checkout with nothing but Python >= 3.12, git and make.
VENV   := .venv
BIN    := $(VENV)/bin
# The first interpreter that is new enough; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3.12 python3 python python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types unit format env clean help

help:            ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(STAMP)   ## digits -> activation store -> three SAEs -> table and report, in under 3 minutes
	$(BIN)/python examples/demo.py

test: lint types unit   ## what CI runs: lint, import rules, types, tests (with the README's commands)

lint: $(STAMP)   ## ruff and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## pyright
	$(BIN)/pyright

unit: $(STAMP)   ## pytest
	$(BIN)/python -m pytest

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)    ## make the environment in .venv (the other targets do it when it is missing)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.12 found: install Python 3.12 (python.org, your package manager, or 'pyenv install 3.12'), or run 'make PYTHON=/path/to/python'." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:           ## remove what the demo and the tools left (not .venv)
	rm -rf demo runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
