# `make` alone lists the targets. Needs Python 3.11 or newer; PYTHON=... picks one.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
BUILT := build/.ops
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

# The first of these that runs and is new enough. python3 comes first: in a container with CUDA it has torch already.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: help venv build demo test faults test-gpu compat check bench clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(BUILT)  ## make .venv with the package and everything the tests need
	@:

build: $(BUILT)  ## build the compiled ops again, if csrc/ changed (part of every other target)
	@:

$(STAMP): pyproject.toml constraints-cpu.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or newer is needed and none was found: install one, or make venv PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make venv PYTHON=/path/to/a/newer/python" >&2; exit 1; }
# A torch with CUDA that is already there (NVIDIA's containers) is used as it is, and pinned against pip.
	@if torch=$$($(PYTHON) -c 'import torch; assert torch.version.cuda; print(torch.__version__)' 2>/dev/null); then \
		$(PYTHON) -m venv --clear --system-site-packages $(VENV); \
		echo "torch==$$torch" > $(VENV)/constraints.txt; \
	else \
		$(PYTHON) -m venv --clear $(VENV); \
		cp constraints-cpu.txt $(VENV)/constraints.txt; \
	fi
	@echo "installing into $(VENV), about a minute"
	@$(PIP) install --editable '.[dev]' --constraint $(VENV)/constraints.txt
	@touch $@

# Installing the package builds them if torch is there already; in a new environment it is not. Without a compiler this
# says so, once, and the targets go on without.
$(BUILT): setup.py $(shell find csrc -type f) $(STAMP)
	@$(VENV)/bin/python setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

demo: $(BUILT)  ## train a tiny Emu2 on real samples, with 3D parallelism, on this machine
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash examples/demo.sh

test: $(BUILT)  ## all tests that need no GPU, but for the long fault injections
	@$(VENV)/bin/pytest -q -rs -m "not gpu and not faults"

faults: $(BUILT)  ## every fault injection: kills, full disks, damaged files; about ten minutes
	@$(VENV)/bin/pytest -q tests/faults

test-gpu: $(BUILT)  ## the tests that need a GPU
	@$(VENV)/bin/pytest -q -m gpu

compat: $(BUILT)  ## all tests that need no GPU, on Python 3.12 with the newest megatron-core (5 GB more)
	@$(VENV)/bin/nox --session compat

check: $(BUILT)  ## ruff, mypy and the fast tests
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy --no-error-summary
	@$(VENV)/bin/pytest -q -m "not slow and not gpu and not faults"

bench: $(BUILT)  ## every benchmark; each ends with a ratio and fails below its target
	@failed=; for file in $(wildcard benchmarks/[a-z]*.py); do \
		echo "== $$file"; $(VENV)/bin/python "$$file" || failed="$$failed $$file"; \
	done; if [ -n "$$failed" ]; then echo "below target, or ended by an error:$$failed" >&2; exit 1; fi

clean:  ## remove the environment, caches and builds; runs/ stays
	@rm -rf $(VENV) .nox build dist *.egg-info emu2_megatron/ops/_C.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
