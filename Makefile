# Everything runs from a fresh clone: the first target that needs it makes .venv and installs what is pinned.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PRESET ?= auto
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: .venv/ready ## the whole road, text to report (PRESET=small on a GPU); goes on if interrupted
	$(PYTHON) road.py --preset $(PRESET)

test: .venv/ready-dev ## all tests that take seconds
	$(PYTHON) -m pytest -n 2

test-slow: .venv/ready-dev ## all tests, also those that take minutes
	$(PYTHON) -m pytest -n 2 --run-slow

lint: .venv/ready-dev ## style
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/ready-dev ## measure again what docs/results.md says
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/all.py

clean: ## remove runs, caches and the virtual environment
	rm -rf runs data/cache .venv .pytest_cache .ruff_cache

.venv/ready: requirements.txt
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 2; }
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: help run test test-slow lint bench clean
