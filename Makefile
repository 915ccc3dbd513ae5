# setup: the environment in .venv   demo: the whole way on real code   test: all tests   lint: ruff and mypy
PYTHON ?= $(firstword $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p; done))
VENV := .venv

.PHONY: setup demo test lint
setup: $(VENV)/.installed

# Only a finished installation leaves the mark, so that an interrupted one is done again.
$(VENV)/.installed: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: megacode needs Python 3.11 or 3.12; install one, or: make PYTHON=/path/to/it"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(VENV)/bin/megacode demo $(ARGS)

test: setup
	$(VENV)/bin/pytest $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
