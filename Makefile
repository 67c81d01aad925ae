# The front door. Needs Python 3.11 to 3.13, a C compiler and git; everything else is installed into this folder.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo "$$p" && break; \
	done),python3)
BIN := .venv/bin
SOURCES := $(wildcard packages/*/src shared/*/src kernels/src)
STRICT := $(wildcard shared/*/src kernels/src)
METHODS := $(notdir $(patsubst %/,%,$(dir $(wildcard packages/*/pyproject.toml))))
empty :=
JOINED := $(subst $(empty) $(empty),:,$(strip $(SOURCES)))
PYTEST := -m pytest -n 2 --dist worksteal --timeout 900

.PHONY: help env reproduce test check check-latest bench test-gpu lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

env: ## Make the environment (.venv) from the lock, hashes checked; the other targets do this by themselves
	@$(PYTHON) tools/environment.py

reproduce: env ## Measure every paper's tables on small trained models and print them beside the papers' figures
	@$(BIN)/paper-tables run --all --scale quick
	@$(BIN)/paper-tables report

test: env ## Run all tests, slow ones too; GPU tests are skipped with a reason (make test ARGS="-m 'not slow'")
	@$(BIN)/python $(PYTEST) $(ARGS)

check: env ## Formatting, lint, types, import borders, lock
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# Both at once, each with a cache of its own: with other options mypy takes nothing from the other's.
	export MYPYPATH=$(JOINED); \
	$(BIN)/mypy --strict --cache-dir .mypy_cache/shared $(STRICT) tools & \
	$(BIN)/mypy --cache-dir .mypy_cache/packages $(wildcard packages/*/src); packages=$$?; \
	wait $$! && exit $$packages
	$(BIN)/python tools/borders.py
	$(BIN)/python tools/lock.py --check

check-latest: ## Run the shared packages' tests with the newest transformers and torch, in an environment of their own
	@$(PYTHON) tools/environment.py latest
	@.venv-latest/bin/python -c 'import torch, transformers as t; print("transformers", t.__version__, "torch", torch.__version__)'
	@.venv-latest/bin/python $(PYTEST) $(patsubst %/src,%,$(STRICT)) $(ARGS)

bench: env ## Run every package's benchmark
	@set -e; for name in $(METHODS); do echo "== $$name"; $(BIN)/$$name bench $(ARGS); done

test-gpu: ## GPU tests and benchmarks with a python3 that has torch, triton, transformers and pytest; nothing is installed
	@PYTHONPATH=$(JOINED) python3 tools/gpu.py

lock: env ## Lock again after a change of dependencies
	@$(PYTHON) tools/lock.py $(ARGS)

clean: ## Remove environments, caches and results
	rm -rf .venv .venv-latest .tools .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
